"""Weights that stay where they are: in files, mapped, and made only where they are used."""
