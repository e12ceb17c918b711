"""Pipelines as text and as YAML, read and written.

The text is ``name{key=value key=value},name``; `pipeline.options` says what a value is. The YAML
is a list of ``name`` and ``name: {key: value}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from graphprune.errors import GraphPruneError, PipelineError, add_context
from graphprune.pipeline import registry
from graphprune.pipeline.mend import mended
from graphprune.pipeline.options import BARE, QUOTED, Word
from graphprune.pipeline.pass_base import Pass

_VALUE = rf"(?:{QUOTED}|{BARE})"
_NAME = re.compile(r"\s*([\w.-]+)\s*")
_OPTION = re.compile(rf"\s*([\w-]+)=((?:{_VALUE}(?:,{_VALUE})*)?)(?=[\s}}])")
_WORD = re.compile(rf"({QUOTED})|({BARE})")
_COMMA = re.compile(r"\s*,")
_CLOSE = re.compile(r"\s*\}\s*")


def read_text(text: str) -> list[Pass]:
    """Read the passes that `text` spells, at least one.

    Raises
    ------
    PipelineError
        When the text is malformed, or a pass or option is unknown or ill-typed; names the column
        and the nearest name, and what to write where another kind of bracket or separator was
        used. An error that a pass raises for its options is placed likewise.
    """
    try:
        return _read_passes(text)
    except PipelineError as error:
        if suggestion := _suggestion(text):
            raise PipelineError(f"{error}; did you mean {suggestion!r}?") from error
        raise


def _suggestion(text: str) -> str:
    """Return another spelling of `text` that can be read, or ""."""
    spelled = mended(text, registry.names())
    try:
        return spelled if spelled != text and _read_passes(spelled) else ""
    except GraphPruneError:
        return ""


def _read_passes(text: str) -> list[Pass]:
    pass_, at = _read_pass(text, 0)
    passes = [pass_]
    while at < len(text):
        pass_, at = _read_pass(text, _expect(_COMMA, text, at, "',' or the end").end())
        passes.append(pass_)
    return passes


def write_text(passes: Iterable[Pass]) -> str:
    """Return the text that `read_text` reads back."""
    return ",".join(map(str, passes))


def read_yaml(text: str) -> list[Pass]:
    """Read the passes that a YAML list holds, at least one.

    Raises
    ------
    PipelineError
        When it is not such a list, or a pass or option is unknown or ill-typed; names the item and
        the nearest name.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"pipeline is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, list) or not data:
        raise PipelineError("a YAML pipeline is a list of passes, such as '- verify'")
    passes = []
    for number, item in enumerate(data, 1):
        with _at(f"pipeline item {number}"):
            passes.append(_from_item(item))
    return passes


def write_yaml(passes: Iterable[Pass]) -> str:
    """Return the YAML text that `read_yaml` reads back."""
    items = [{each.name: _plain(each)} if each.values() else each.name for each in passes]
    # Escaped to ASCII, because PyYAML does not read back every other character that it writes.
    return str(yaml.safe_dump(items, sort_keys=False))


def _read_pass(text: str, at: int) -> tuple[Pass, int]:
    """Read the pass at a position; return the position after it too."""
    name = _expect(_NAME, text, at, "the name of a pass")
    here = f"pipeline column {name.start(1) + 1}"
    with _at(here):
        cls = registry.find(name[1])
    values: dict[str, Any] = {}
    at = name.end()
    if text[at : at + 1] == "{":
        at += 1
        if "}" not in text[at:]:
            raise PipelineError(f"pipeline column {at}: '{{' is not closed: '}}' is missing")
        while not (close := _CLOSE.match(text, at)):
            option = _expect(_OPTION, text, at, "key=value or '}'")
            with _at(f"pipeline column {option.start(1) + 1}"):
                _read_option(cls, option[1], option[2], values)
            at = option.end()
        at = close.end()
    elif text[at:]:
        _expect(_COMMA, text, at, "'{', ',' or the end")  # before what its options lack
    with _at(here):
        return cls.build(values), at


def _read_option(cls: type[Pass], key: str, text: str, values: dict[str, Any]) -> None:
    option = cls.option(key)
    if option.name in values:
        raise PipelineError(f"option {key!r} is given twice")
    try:
        words = [
            Word(json.loads(match[1]), quoted=True) if match[1] else Word(match[2])
            for match in _WORD.finditer(text)
        ]
    except ValueError as error:
        raise PipelineError(f"option {key!r} holds no JSON string: {text}") from error
    values[option.name] = option.read(words)


def _from_item(item: object) -> Pass:
    """Read one pass of a YAML list."""
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        raise PipelineError(f"{item!r} is neither a name nor one name with its options")
    ((name, given),) = item.items()
    cls = registry.find(str(name))
    if not isinstance(given, dict | None):
        raise PipelineError(f"the options of {name!r} are {given!r}, not a mapping")
    values: dict[str, Any] = {}
    for key, value in (given or {}).items():
        option = cls.option(str(key))
        # A text is read as in the text form, because YAML takes 1e-4 for one.
        is_text = isinstance(value, str)
        values[option.name] = option.read([Word(value, True)]) if is_text else option.check(value)
    return cls.build(values)


def _plain(pass_: Pass) -> dict[str, Any]:
    values = pass_.values().items()
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values}


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Put `where` in front of the message of whatever is refused inside."""
    try:
        yield
    except GraphPruneError as error:
        add_context(error, where)
        raise


def _expect(pattern: re.Pattern[str], text: str, at: int, wanted: str) -> re.Match[str]:
    if match := pattern.match(text, at):
        return match
    at = len(text) - len(text[at:].lstrip())
    found = repr(text[at : at + 12]) if text[at:] else "the end"
    raise PipelineError(f"pipeline column {at + 1}: expected {wanted}, found {found}")
