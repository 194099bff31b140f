"""Model directories: manifest, weights (found, checked, converted from GGUF) and tokenizer."""
