"""Every error that graphprune raises on purpose: one line that names what went wrong and where."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class GraphPruneError(Exception):
    """Base of all deliberate errors; catching it catches every refusal of this package."""


class UsageError(GraphPruneError):
    """An argument that makes no sense, whatever the model is."""


class PipelineError(GraphPruneError):
    """A pipeline that cannot be read, or a pass that failed in an unforeseen way."""


class CaptureError(GraphPruneError):
    """A model that `torch.export` cannot turn into a graph."""

    at_all_sizes = False
    """Whether it is known that it cannot, whichever sizes are dynamic."""

    last_attempt = ""
    """Why the last other way to capture it failed too; "" where none was tried."""


class CheckpointError(GraphPruneError):
    """A directory or file that does not hold a loadable model."""


class CalibrationError(GraphPruneError):
    """Calibration data that is missing, too short or does not fit the program."""


class SelectionError(GraphPruneError):
    """A target, pattern or budget that no set of units satisfies."""


class NothingToPrune(SelectionError):
    """A budget of less than one unit."""


class PlanError(GraphPruneError):
    """A plan that cannot be read or was made for another program."""


class RewriteError(GraphPruneError):
    """A plan that cannot be applied to this graph."""


class MergeError(GraphPruneError):
    """KV heads that cannot be merged as asked."""


class VerificationError(GraphPruneError):
    """A rewritten program that is not equal to its reference."""


class BackendError(GraphPruneError):
    """A program that a back end cannot represent."""


class ParityError(BackendError):
    """An ONNX model fails where its program runs, or gives something else."""


class OutputError(GraphPruneError):
    """A place that cannot be written to."""


class EvaluationError(GraphPruneError):
    """Text or a program that cannot be evaluated."""


class TrainingError(GraphPruneError):
    """A training that cannot start, go on or be resumed."""


class ProcessError(GraphPruneError):
    """Processes that were started apart, or of which one has ended before the others."""


def nearest(name: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name nearest to `name`, or "" when none is near.

    What is no text is near to nothing.

    Examples
    --------
    >>> nearest("prun", ["prune", "print", "verify"])
    "; did you mean 'prune'?"
    >>> nearest("ffn", ["model:residual", "model.layers.0.mlp:ffn"])  # a part of a longer name
    "; did you mean 'model.layers.0.mlp:ffn'?"
    """
    if not isinstance(name, str):
        return ""
    names = list(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    matches += [each for each in names if name in re.split(r"[.:]", each)]
    return f"; did you mean {matches[0]!r}?" if matches else ""


PROGRAMS = "load one with graphprune.load(DIR), or capture a model with graphprune.capture(model)"
"""Where programs come from, for messages."""


def refuse_other(given: object, *, than: type, how: str) -> None:
    """Refuse what is of another type `than` it should be, and say `how` to make what is wanted.

    Examples
    --------
    >>> refuse_other("a.txt", than=int, how="read it with int(...)")
    Traceback (most recent call last):
    graphprune.errors.UsageError: 'a.txt' is no int: read it with int(...)
    """
    if not isinstance(given, than):
        what = repr(given) if isinstance(given, str | int | None) else f"a {type(given).__name__}"
        raise UsageError(f"{what} is no {than.__name__}: {how}")


def first_line(error: BaseException, *, typed: bool = False) -> str:
    r"""Return the first line of what `error` says, or the name of its type where it says nothing.

    Where `typed` says so, the name of its type comes in front.

    Examples
    --------
    >>> first_line(ValueError("wrong\nsize")), first_line(KeyError())
    ('wrong', 'KeyError')
    >>> first_line(ValueError("wrong\nsize"), typed=True)
    'ValueError: wrong'
    """
    return _line(error, typed, 0)


def last_line(error: BaseException) -> str:
    """Return the last line of what `error` says, where a validator's reason stands."""
    return _line(error, False, -1)


def _line(error: BaseException, typed: bool, index: int) -> str:
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    return f"{name}: {lines[index]}" if typed else lines[index]


def add_context(error: GraphPruneError, where: str) -> GraphPruneError:
    """Put `where` in front of the message of `error`, and return it.

    Examples
    --------
    >>> str(add_context(PlanError("no group 'ffn'"), "step 2"))
    "step 2: no group 'ffn'"
    """
    error.args = (f"{where}: {error}", *error.args[1:])
    return error
