"""``python -m graphprune`` is the command line."""

from __future__ import annotations

from graphprune.cli.main import main

if __name__ == "__main__":
    main()
