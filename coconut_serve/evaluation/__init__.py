"""Measures accuracy against steps: sends a task file to a server in each mode."""
