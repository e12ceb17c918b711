"""A program as a checkpoint that transformers loads."""
