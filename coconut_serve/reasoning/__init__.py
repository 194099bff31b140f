"""What to feed back: the batched reasoning step both real engines call; no HTTP, no vLLM."""
