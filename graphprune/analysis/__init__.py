"""Finds which slices of which weights go together: axes, their unification, coupled groups."""
