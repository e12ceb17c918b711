"""Matrices that are refitted together, or towards the original's residual stream."""
