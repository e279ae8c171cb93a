"""Decoder families, their loaders (safetensors, GGUF), tokenizers and the registry."""
