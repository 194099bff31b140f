"""Accuracy against steps: runs a task file through a server, mode by mode."""
