"""Models whose layers differ, or lack modules: a config and a small modeling file beside it."""
