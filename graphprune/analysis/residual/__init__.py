"""Residual streams: what is added to them, and what goes when that is not added any more."""
