"""Axes whose units may be replaced by linear combinations of them, so that all is computed anew.

`places`: where an axis stands in values, and how the bases there depend on each other; `operators`:
what each operator says of that; `mixable`: the answer for a group.
"""
