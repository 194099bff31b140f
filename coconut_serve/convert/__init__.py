"""Public checkpoint formats -> a Hugging Face directory with latent_config.json.

A run goes one way: `source` reads files, `registry` finds the format, its function in `formats`
says what the tensors are, `lora` merges, `model` checks them against transformers' own
architecture, `write` writes all or nothing. A new format is one function and one registry line.
"""
