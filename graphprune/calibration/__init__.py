"""Data that programs run on, and what is measured while they do."""
