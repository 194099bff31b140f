"""Converts public checkpoint formats to a Hugging Face directory with latent_config.json.

A pipeline: `source` reads files, `registry` detects the format, its function in `formats` maps
the tensors, `lora` merges adapters, `model` checks the result against transformers' architecture,
`write` writes all or nothing. A new format is one function and one registry line.
"""
