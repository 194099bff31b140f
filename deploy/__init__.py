"""What runs the server in production; `python -m deploy.generate` writes the generated files."""
