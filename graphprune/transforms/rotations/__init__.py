"""Exact edits before a cut: units of a group replaced by combinations of them, by importance.

`layout`: where units lie in weights and matrices; `gramians`: what of them is seen, and what of
that is used; `balance`: the combinations; `rotate`: the edit, and its check.
"""
