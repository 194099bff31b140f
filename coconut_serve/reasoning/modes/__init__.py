"""One file for each mode; registry.py lists them."""
