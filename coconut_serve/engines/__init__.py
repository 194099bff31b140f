"""Implementations of the Engine protocol of base.py; they do not know each other."""
