"""Production deployment; `python -m deploy.generate` writes the generated files."""
