"""What verbs read: the model that a name means, pipelines, plans and calibration text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.cli.console import note
from graphprune.cli.options import CalibrationOptions, Form
from graphprune.errors import CalibrationError, GraphPruneError, PlanError
from graphprune.io import reference
from graphprune.io.paths import path_of

if TYPE_CHECKING:
    from graphprune.calibration.data import Calibration
    from graphprune.ir.program import Program
    from graphprune.pipeline.pipeline import Pipeline
    from graphprune.plan.plan import Plan


def resolve(directory: str) -> str:
    """Return the directory that the command line means: the packaged one, or itself."""
    return str(reference.checkpoint_dir()) if directory == reference.NAME else directory


def read_pipeline(passes: str) -> Pipeline:
    """Read a pipeline from its text, or from a YAML file if `passes` ends as the name of one."""
    from graphprune.pipeline.pipeline import Pipeline

    if passes.endswith((".yaml", ".yml")):
        return Pipeline.from_yaml(Path(passes))
    return Pipeline.parse(passes)


def in_form(pipeline: Pipeline, form: Form) -> Pipeline:
    """Let every pass that can choose sizes for a plain checkpoint do so, if one is asked for."""
    if form is Form.any:
        return pipeline
    asked = {"form": form.value}
    return dataclasses.replace(
        pipeline,
        passes=[
            dataclasses.replace(each, **asked)
            if asked.keys() <= each.options().keys() and vars(each)["form"] is None
            else each
            for each in pipeline.passes
        ],
    )


def refuse_uncalibrated(pipeline: Pipeline, options: CalibrationOptions, directory: str) -> None:
    """Refuse a pipeline that needs a text which nobody gives, before anything slow starts.

    Raises
    ------
    GraphPruneError
        When it needs one, or when a criterion has a name that is not known.
    """
    from graphprune.pipeline.pass_manager import uncalibrated

    given = options.calibration is not None or directory == reference.NAME
    for number, each in enumerate(pipeline.passes, 1):
        if each.requires_calibration and not given:  # asked in any case: it looks criteria up
            raise CalibrationError(f"pass {number} ({each.name}): {uncalibrated(each)}")


def require_text(path: Path | None, error: type[GraphPruneError]) -> None:
    """Refuse a text that is missing before anything slow starts.

    Raises
    ------
    GraphPruneError
        Of the class `error`. Data sets and fields, which have a colon, are left to their reader.
    """
    if path is not None and not path_of(path, error).exists() and ":" not in str(path):
        raise error(f"{path} does not exist")


def read_plan(path: Path) -> Plan:
    """Read a plan from its file, or from the directory that holds it as ``plan.json``.

    Raises
    ------
    PlanError
        When there is no such file, or it is not a plan.
    """
    from graphprune.plan.plan import Plan

    if path_of(path, PlanError).is_dir():
        if not (path / "plan.json").is_file():
            raise PlanError(f"{path} holds no plan.json: give a plan, or what 'run' wrote")
        path = path / "plan.json"
    if not path.is_file():
        raise PlanError(f"{path} does not exist")
    return Plan.load(path)


def read_calibration(
    options: CalibrationOptions,
    pipelines: Iterable[Pipeline],
    program: Program,
    directory: str,
    seed: int,
) -> tuple[Calibration | None, Calibration | None]:
    """Read calibration data: what is named, or the packaged text for the packaged model.

    Where nobody asks for a number of windows of a text, there are as many as the pipelines need.

    Returns
    -------
    data
        The text or tensors, to measure on; None where there are none.
    fitted
        The same if it is to be fitted to: not where it is the packaged text and no pass needs any.
    """
    from graphprune.calibration.data import Calibration
    from graphprune.calibration.tokens import check_takes_text

    is_fitted_to = options.calibration is not None or any(
        each.requires_calibration for pipeline in pipelines for each in pipeline.passes
    )
    path = options.calibration
    if path is None and directory == reference.NAME:
        path = reference.calibration_text()
    if path is None:
        return None, None
    if path.suffix == ".safetensors":
        data = Calibration.from_tensors(path, samples=options.samples, seed=seed)
        return data, data
    check_takes_text(program)
    text = Calibration.from_text(
        path,
        resolve(options.tokenizer or directory),
        samples=options.samples,
        length=options.calibration_length,
        seed=seed,
        first_token=options.first_token,
    ).for_program(program)
    if is_fitted_to:
        for pipeline in pipelines:
            text = pipeline.enough(text, program)
        if text.tokens < text.wanted:
            note(
                f"{text.tokens:,} tokens of calibration text, where the passes do well by "
                f"{text.wanted:,}: give more"
            )
    return text, text if is_fitted_to else None
