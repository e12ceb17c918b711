"""Files in and out: atomic writes, text sources, progress, the packaged checkpoint."""
