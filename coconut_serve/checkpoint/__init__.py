"""Model directories: manifest, conversion to safetensors, tokenizer."""
