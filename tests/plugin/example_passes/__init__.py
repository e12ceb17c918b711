"""Passes for graphprune from outside of it."""
