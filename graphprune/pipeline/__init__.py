"""Passes in order: their options, text, registry, manager and instruments."""
