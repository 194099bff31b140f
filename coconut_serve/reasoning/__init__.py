"""The batched reasoning step of both real engines: what to feed back. No HTTP, no vLLM."""
