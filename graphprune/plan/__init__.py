"""Decisions as plain data: which units of which groups go, and which heads are merged."""
