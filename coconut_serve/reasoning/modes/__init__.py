"""One file a mode; registry.py lists them."""
