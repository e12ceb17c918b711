"""Every patch of torch and transformers that capture needs: one context manager each, with why.

Each module states the version whose code it was read in; all are undone on leaving.
"""
