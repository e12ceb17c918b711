"""The built-in passes, one to a module.

The folder is `passes/` at the top of the checkout and the package is `graphprune.passes`: the two
names are the same files, so only one of them may be imported, or every class in them would exist
twice.
"""

if __name__ != "graphprune.passes":
    raise ImportError(f"these passes are imported as 'graphprune.passes', not as {__name__!r}")
