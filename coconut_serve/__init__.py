"""Serve latent reasoning: an OpenAI-compatible server whose clients pick how the model thinks."""

__version__ = "0.1.0"
