"""A Triton backend for the CPU that compiles nothing."""
