"""The modes inside vLLM, through its own extension points; the only package that imports vllm."""
