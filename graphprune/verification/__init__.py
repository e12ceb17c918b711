"""Proves a program equal to its masked original."""
