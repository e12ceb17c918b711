"""Attention read as one thing: where its heads lie, what its mask means, how it rotates."""
