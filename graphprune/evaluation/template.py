"""Pipelines that differ in a ratio, and the ratios to try.

A template is a pipeline as text (or a YAML file) with ``{ratio}`` where the ratio goes, once or
more often: ``prune{target=ffn ratio={ratio}},reconstruct``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from graphprune.errors import GraphPruneError, PipelineError, UsageError, add_context
from graphprune.pipeline.pipeline import Pipeline

MARK = "{ratio}"
"""What a template holds where the ratio goes."""

STEPS = 6
"""How many ratios a range ``a..b`` is, where that is not said."""


def read_ratios(text: str, steps: int = STEPS) -> tuple[float, ...]:
    """Return the ratios that a text means: numbers and ranges, with commas between.

    Parameters
    ----------
    text
        ``0.25``, ``0.1..0.6`` (`steps` ratios, both ends among them) or ``0.1..0.6..0.05`` (with
        the step between two), or several of these.
    steps
        How many ratios a range without a step is.

    Raises
    ------
    UsageError
        When it is something else, or a ratio is not in [0, 1).

    Examples
    --------
    >>> read_ratios("0.1..0.3..0.1,0.5"), read_ratios("0.2..0.6", 3)
    ((0.1, 0.2, 0.3, 0.5), (0.2, 0.4, 0.6))
    """
    found = (ratio for part in text.split(",") for ratio in _read_range(part.strip(), steps))
    ratios = tuple(dict.fromkeys(round(ratio, 9) for ratio in found))
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise UsageError(f"ratios {text!r}: {ratio:g} is not in [0, 1)")
    return ratios


def _read_range(text: str, steps: int) -> list[float]:
    try:
        numbers = [float(number) for number in text.split("..")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers
    if len(numbers) not in (2, 3) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"ratios: {text!r} is no number and no range such as 0.1..0.6..0.1")
    first, last, *by = numbers
    if first >= last or (by and by[0] <= 0):
        raise UsageError(f"ratios: the range {text!r} goes nowhere")
    if not by:
        if steps < 2:
            raise UsageError(f"ratios: the range {text!r} has two ends, and {steps} steps do not")
        return [first + (last - first) * at / (steps - 1) for at in range(steps)]
    return [first + by[0] * at for at in range(math.floor((last - first) / by[0] + 1e-9) + 1)]


@dataclass(frozen=True)
class PipelineTemplate:
    """Pipelines that differ in the ratio.

    Parameters
    ----------
    name
        The text, or the name of the file.
    text
        The pipeline with `MARK` in it.
    is_yaml
        Whether the text is YAML.
    """

    name: str
    text: str
    is_yaml: bool = False

    @classmethod
    def read(cls, text: str) -> PipelineTemplate:
        """Take `text` as a template, or read the YAML file of that name.

        Raises
        ------
        PipelineError
            When the file cannot be read, or nothing says where the ratio goes.
        """
        template = cls(text, text)
        if text.endswith((".yaml", ".yml")):
            try:
                template = cls(text, Path(text).read_text(encoding="utf-8"), is_yaml=True)
            except (OSError, UnicodeDecodeError) as error:
                raise PipelineError(f"cannot read the recipe {text}: {error}") from error
        if MARK not in template.text:
            raise PipelineError(
                f"recipe {text!r} has no {MARK}, such as in prune{{target=ffn ratio={MARK}}}"
            )
        return template

    def at(self, ratio: float) -> Pipeline:
        """Return the pipeline with this ratio.

        Raises
        ------
        PipelineError
            When it is none, naming the recipe and the ratio.
        """
        text = self.text.replace(MARK, repr(ratio))
        try:
            return Pipeline.from_yaml(f"{text}\n") if self.is_yaml else Pipeline.parse(text)
        except GraphPruneError as error:
            add_context(error, f"recipe {self.name!r} at ratio {ratio:g}")
            raise
