"""Key and value heads: where they lie, and several made one."""
