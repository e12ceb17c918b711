"""Scores in a file, so that another budget costs no second look at the data."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from graphprune import ranks
from graphprune.calibration.cache import read_cache, write_cache
from graphprune.criteria.base import Criterion, Scores, ScoringContext, check_scores, criterion
from graphprune.errors import CalibrationError
from graphprune.io.atomic import staged_file


def load_or_score(
    path: str | PathLike[str], scorer: Criterion | str, context: ScoringContext
) -> Scores:
    """Read the scores of a criterion from the file at `path`; without a file, make them.

    What is made is checked and written there. A file serves every budget and selection on the
    same weights, for groups that are among those it was made for.

    Parameters
    ----------
    path
        A safetensors file, read where it exists, else made.
    scorer
        The criterion, or its name.
    context
        What it looks at. Without calibration data a file that exists is taken as it is.

    Raises
    ------
    CalibrationError
        When the file is no such file; is of another program, other weights, other data, another
        criterion, aggregate or seed; or lacks a group.
    SelectionError
        When scores are missing, misshapen or not finite.
    OutputError
        When the file cannot be written; asked before anything is scored.
    """
    held = criterion(scorer) if isinstance(scorer, str) else scorer
    options: dict[str, Any] = {"criterion": held.name}
    if held.settings:
        options["settings"] = held.settings
    options |= {"aggregate": context.aggregate, "seed": context.seed}
    # What looks at no data does not depend on it.
    data = context.calibration if held.requires_calibration else None
    if not ranks.of_first(Path(path).exists):
        with staged_file(path) as staged:  # first: a path that cannot be written costs no work
            scores = held.scores(context)
            check_scores(scores, context)
            write_cache(staged, "scores", scores, context.program, data, **options)
        return scores
    names = context.coupling.current_names
    found = read_cache(path, "scores", context.program, data, **options)
    scores = {names.get(name, name): score for name, score in found.items()}
    if lacking := [group.name for group in context.groups if group.name not in scores]:
        raise CalibrationError(f"{path} lacks the scores of {lacking[0]}")
    check_scores(scores, context)
    return {group.name: scores[group.name] for group in context.groups}
