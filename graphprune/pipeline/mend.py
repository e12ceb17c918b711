"""Guess what a malformed pipeline meant, and write it as it should be."""

from __future__ import annotations

import re
from collections.abc import Collection

from graphprune.pipeline.options import BARE, QUOTED

_VALUE = rf"(?:{QUOTED}|[^\s{{}}()\[\],;=\"]+)"
_OPTION = re.compile(rf"([\w-]+)\s*[=:]\s*({_VALUE})?")
_NEXT_VALUE = re.compile(rf"\s*,\s*((?>{_VALUE}))(?!\s*[=:{{(\[])")
_WORD = re.compile(BARE.replace("[^", r"[^()\[\];:"))
_BETWEEN = re.compile(r"[\s,;{}()\[\]]+")


def mended(text: str, passes: Collection[str]) -> str:
    """Return the pipeline that `text` may have meant, in braces, spaces and commas.

    Brackets of any kind, colons and commas between options, and what is missing of all these are
    read alike: a word is a pass, and what has a value is an option of the pass before it.

    Parameters
    ----------
    text
        A pipeline that cannot be read.
    passes
        Names of passes; after a comma such a word begins a pass, any other one is a value.

    Examples
    --------
    >>> mended("prune(target=ffn,kv-heads, ratio=0.5); verify", ["prune", "verify"])
    'prune{target=ffn,kv-heads ratio=0.5},verify'
    """
    found: list[tuple[str, list[str]]] = []
    at = 0
    while at < len(text):
        if skipped := _BETWEEN.match(text, at):
            at = skipped.end()
        elif (option := _OPTION.match(text, at)) and found:
            values, at = [option[2] or ""], option.end()
            while (value := _NEXT_VALUE.match(text, at)) and value[1] not in passes:
                values.append(value[1])
                at = value.end()
            found[-1][1].append(f"{option[1]}={','.join(values)}")
        elif word := _WORD.match(text, at):
            found.append((word[0], []))
            at = word.end()
        else:
            return text
    return ",".join(f"{name}{{{' '.join(given)}}}" if given else name for name, given in found)
