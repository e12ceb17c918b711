"""A program as a directory: its graph as text, its weights as safetensors."""
