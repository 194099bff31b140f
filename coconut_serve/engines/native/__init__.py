"""The default engine: torch + transformers over a paged KV cache."""
