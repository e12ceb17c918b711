"""Typed options: the fields of a frozen dataclass, read from and written as text.

An option is ``key=value``. A value is a bare word, or a JSON string where it holds a space or one
of ``{ } , = "``; a tuple is values joined by commas, and nothing at all is the empty one. ``none``
stands for None where the annotation allows it. The annotation decides what a word means, so that
``path=2026`` is a text and ``seed=2026`` a number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from graphprune.errors import PipelineError, nearest

BARE = r'[^\s{},="]+'
QUOTED = r'"(?:[^"\\]|\\.)*"'


class Word(NamedTuple):
    """One value as written."""

    text: str
    quoted: bool = False


REQUIRED = dataclasses.MISSING
"""The default of an option that has none."""

_WANTS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}
_NAMES: dict[type, str] = {bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Parameters
    ----------
    name
        The field's name.
    scalar
        What one value is: bool, int, float or str.
    default
        The field's default, or `REQUIRED`.
    choices
        The values allowed, for a `Literal`.
    many
        Whether the option is a tuple of such values.
    optional
        Whether None is allowed.
    renamed
        Words of old for some of `choices` -> what they are called now.
    """

    name: str
    scalar: type
    default: Any
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        """Return whether the option must be given."""
        return self.default is REQUIRED

    @property
    def type_text(self) -> str:
        """The type as people read it: ``float``, ``taylor|random``, ``str,... or none``."""
        text = "|".join(self.choices) or _NAMES[self.scalar]
        return text + (",..." if self.many else "") + (" or none" if self.optional else "")

    def read(self, words: Sequence[Word]) -> Any:
        """Return the value that `words` spell.

        Raises
        ------
        PipelineError
            When they do not spell a value of this option's type.
        """
        if self.optional and [*words] == [Word("none")]:
            return None
        if self.many:
            return tuple(self._read(word.text) for word in words)
        if len(words) != 1:
            raise PipelineError(f"option {self.name!r} takes one value, not {len(words)}")
        return self._read(words[0].text)

    def check(self, value: object) -> Any:
        """Return `value`, with an int made a float and a list or one text a tuple if the type asks.

        Raises
        ------
        PipelineError
            When it is not of this option's type.
        """
        if value is None and self.optional:
            return None
        if not self.many:
            return self._check(value)
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, (tuple, list)):
            raise self._refusal(value, "a list")
        return tuple(self._check(each) for each in value)

    def write(self, value: Any) -> str:
        """Return `value` as text that `read` reads back."""
        if value is None:
            return "none"
        return ",".join(_spell(each) for each in (value if self.many else (value,)))

    def _read(self, text: str) -> Any:
        if self.scalar is bool:
            return self._check({"true": True, "false": False}.get(text, text))
        if self.scalar is str:
            return self._check(text)
        try:
            return self._check(self.scalar(text))
        except ValueError:
            wants = _WANTS[self.scalar]
            if self.scalar is float and re.fullmatch(r"\d+(\.\d*)?%", text):
                wants += f", such as {float(text[:-1]) / 100:g}"
            raise self._refusal(text, wants) from None

    def _check(self, value: object) -> Any:
        if self.scalar is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.scalar:
            raise self._refusal(value, _WANTS.get(self.scalar, "a text"))
        if isinstance(value, float) and not math.isfinite(value):
            raise self._refusal(value, "a finite number")
        if isinstance(value, str):
            value = self.renamed.get(value, value)
        if self.choices and value not in self.choices:
            raise self._refusal(value, f"one of {', '.join(self.choices)}", str(value))
        return value

    def _refusal(self, value: object, wanted: str, choice: str = "") -> PipelineError:
        hint = nearest(choice, self.choices) if choice else ""
        return PipelineError(f"option {self.name!r} wants {wanted}, not {value!r}{hint}")


def options_of(cls: type) -> dict[str, Option]:
    """Return the options of a dataclass by name, in the order of its fields.

    Raises
    ------
    TypeError
        When a field's annotation cannot be an option.
    """
    hints = get_type_hints(cls)
    return {
        field.name: _option(field.name, hints[field.name], _default(field))
        for field in dataclasses.fields(cls)
        if field.init
    }


def _option(name: str, annotation: Any, default: Any) -> Option:
    union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if union else (annotation,)
    kinds = [member for member in members if member is not types.NoneType]
    kind = kinds[0] if len(kinds) == 1 else None
    many = get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
    if many:
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    scalar = str if choices and all(isinstance(c, str) for c in choices) else kind
    if not isinstance(scalar, type) or scalar not in _NAMES:
        raise TypeError(f"option {name!r} cannot be of type {annotation}")
    return Option(name, scalar, default, choices, many, optional=len(kinds) < len(members))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    if value != "none" and re.fullmatch(BARE, value):
        return value
    return json.dumps(value, ensure_ascii=False)
