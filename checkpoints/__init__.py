"""Checkpoint files: safetensors, GGUF, tokenizers."""
