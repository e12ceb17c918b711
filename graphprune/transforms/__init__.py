"""Carries plans out, and edits weights: the only package that makes new ones."""
