"""Verbs that measure: `evaluate`, `sensitivity`, `sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.console import show
from graphprune.cli.inputs import read_calibration, require_text, resolve
from graphprune.cli.options import (
    AsJson,
    CalibrationOptions,
    Checkpoint,
    HeldOutOptions,
    LoadOptions,
)
from graphprune.cli.session import Session, verb
from graphprune.errors import CalibrationError, EvaluationError
from graphprune.io.atomic import as_json as to_json

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.ir.program import Program


@verb("graphprune evaluate OUT --original DIR --text heldout.txt")
def evaluate(
    session: Session,
    directory: Checkpoint,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The model that it was made from: compares what both give. For a model that "
            "predicts no next token this is what there is to measure; inputs that are no text "
            "come as --text FILE.safetensors.",
        ),
    ] = None,
    *,
    heldout: HeldOutOptions,
    loading: LoadOptions,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a language model, or how far any model is from its original."""
    from graphprune.evaluation.perplexity import perplexity, why_not_causal

    require_text(heldout.text, EvaluationError)
    program = session.load(directory, loading)
    if original is not None:
        _compare(session, program, directory, session.load(original, loading), heldout, as_json)
        return
    if why := why_not_causal(program):
        raise EvaluationError(
            f"perplexity needs a causal language model{why}; --original DIR compares the outputs "
            "with those of the model that this one was made from"
        )
    found = perplexity(
        program,
        heldout.path,
        resolve(heldout.tokenizer or directory),
        length=heldout.length,
        max_tokens=heldout.max_tokens,
        batch_size=heldout.batch_size,
        first_token=heldout.first_token,
        progress=session.progress or False,
    )
    if as_json:
        print(to_json({"text": str(heldout.path), **found.to_dict()}))
        return
    print(f"perplexity {found.perplexity:.4f}")
    print(f"loss       {found.loss:.4f} nats per token")
    print(f"tokens     {found.tokens} of {heldout.path.name}, in windows of {found.length}")
    if found.first:
        print(f"windows    begin with the tokenizer's own {', '.join(map(str, found.first))}")


def _compare(
    session: Session,
    program: Program,
    directory: str,
    original: Program,
    heldout: HeldOutOptions,
    as_json: bool,
) -> None:
    """Print how far `program` is from `original` on held-out data."""
    from rich.table import Table

    from graphprune.calibration.data import inputs_of
    from graphprune.evaluation.comparison import compare

    batches = [inputs_of(batch) for batch in _batches(original, directory, heldout)]
    found = compare(original, program, batches, session.progress)
    if as_json:
        print(to_json({"text": str(heldout.path), **found.to_dict()}))
        return
    table = Table("", "original", "this one")
    for row in found.measures():
        table.add_row(*row)
    show(table)
    print(f"compared on {found.counted} of {heldout.path.name}")


def _batches(
    program: Program, directory: str, heldout: HeldOutOptions
) -> Sequence[Mapping[str, Tensor]]:
    """Return held-out tensors by name, labels too, or what `program` takes of held-out text."""
    from graphprune.calibration.data import Calibration, split_samples
    from graphprune.calibration.tokens import why_no_text
    from graphprune.io.tensor_sources import draw_samples

    if heldout.path.suffix == ".safetensors":
        drawn = draw_samples(heldout.path, None, seed=0)
        data = Calibration.from_batches(
            [batch for part in drawn for batch in split_samples(part, heldout.batch_size)]
        )
        data.check(program)
        return list(data.labeled())
    if problem := why_no_text(program):
        raise EvaluationError(f"{problem}: give --text FILE.safetensors with inputs by name")
    return _text_batches(program, directory, heldout)


def _text_batches(
    program: Program, directory: str, heldout: HeldOutOptions
) -> list[dict[str, Tensor]]:
    """Return what `program` takes of held-out text, by the tokenizer that is given or its own."""
    from graphprune.evaluation.ablation import text_batches
    from graphprune.evaluation.perplexity import text_windows

    windows = text_windows(
        program,
        heldout.path,
        resolve(heldout.tokenizer or directory),
        length=heldout.length,
        max_tokens=heldout.max_tokens,
        first_token=heldout.first_token,
    )
    return text_batches(program, windows, heldout.batch_size)


@verb("graphprune sensitivity DIR --group heads --text heldout.txt")
def sensitivity(
    session: Session,
    directory: Checkpoint,
    file: Annotated[
        Path | None, typer.Argument(hidden=True, help="Where '--json FILE' of before writes.")
    ] = None,
    *,
    group: Annotated[
        str,
        typer.Option(
            help="heads: the query heads of every attention. Or a target of 'prune', such as "
            "kv-heads, ffn, experts or a glob over group names."
        ),
    ] = "heads",
    blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Remove units in N runs of neighbors; one by one if left out, and in 64 runs "
            "where a group has more units than that.",
        ),
    ] = None,
    keep_one: Annotated[
        bool, typer.Option(help="Also remove all units of a group but the best one.")
    ] = True,
    as_json: AsJson = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw them as a heat map: .png, .svg or .pdf."),
    ] = None,
    heldout: HeldOutOptions,
    loading: LoadOptions,
) -> None:
    """Measure what the model loses by each unit, such as each head, one at a time."""
    from graphprune.analysis.coupling import analyze
    from graphprune.evaluation.ablation import sensitivity
    from graphprune.io.atomic import staged_file
    from graphprune.report.plots import check_format

    require_text(heldout.text, EvaluationError)
    if picture is not None:
        check_format(picture)
    file = None if str(file) == "-" else file
    as_json = as_json and file is None
    with ExitStack() as stack:  # places that cannot be written are refused first
        json_file = stack.enter_context(staged_file(file)) if file else None
        picture_file = stack.enter_context(staged_file(picture)) if picture else None
        program = session.load(directory, loading)
        batches = _text_batches(program, directory, heldout)
        with session.working("analyzing"):
            coupling = analyze(program)
        found = sensitivity(
            coupling, batches, group, blocks=blocks, keep_one=keep_one, progress=session.progress
        )
        if json_file is not None:
            json_file.write_text(found.to_json() + "\n", encoding="utf-8")
        if picture_file is not None:
            found.picture(picture_file)
    if as_json:
        print(found.to_json())
    else:
        show(found)


@verb("graphprune sweep DIR --passes 'prune{target=ffn ratio={ratio}}' --ratios 0.1..0.6 -o OUT")
def sweep(
    session: Session,
    directory: Checkpoint,
    passes: Annotated[
        list[str],
        typer.Option(
            help="A recipe such as 'prune{target=ffn ratio={ratio}}', or a .yaml file; may be "
            "repeated."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="A directory to make, or a sweep to go on with."
        ),
    ],
    *,
    ratios: Annotated[
        str, typer.Option(help="Numbers and ranges a..b or a..b..step, with commas between.")
    ] = "0.1..0.6",
    steps: Annotated[int, typer.Option(help="Ratios of a range a..b.", min=2)] = 6,
    seeds: Annotated[int, typer.Option(help="Draws of calibration text, and seeds.", min=1)] = 1,
    calibration: CalibrationOptions,
    heldout: HeldOutOptions,
    loading: LoadOptions,
    as_json: AsJson = False,
) -> None:
    """Measure what is lost against size for several recipes: a table, JSON and a picture.

    That is the perplexity of a language model, and how far any other is from the original.
    """
    from graphprune.evaluation.held_out import HeldOut, HeldOutData, HeldOutSamples
    from graphprune.evaluation.perplexity import why_not_causal
    from graphprune.evaluation.sweep import sweep
    from graphprune.evaluation.template import PipelineTemplate, read_ratios

    require_text(heldout.text, EvaluationError)
    require_text(calibration.calibration, CalibrationError)
    chosen = read_ratios(ratios, steps)
    recipes = [PipelineTemplate.read(text) for text in dict.fromkeys(passes)]
    pipelines = [recipe.at(ratio) for recipe in recipes for ratio in chosen]
    program = session.load(directory, loading)
    draws = [
        read_calibration(calibration, pipelines, program, directory, seed)[1]
        for seed in range(seeds)
    ]
    measured_on: HeldOutData = (
        HeldOutSamples(_batches(program, directory, heldout))
        if heldout.path.suffix == ".safetensors" or why_not_causal(program)
        else HeldOut(
            heldout.path,
            resolve(heldout.tokenizer or directory),
            heldout.length,
            heldout.batch_size,
            heldout.max_tokens,
            heldout.first_token,
        )
    )
    found = sweep(
        program, recipes, chosen, measured_on, output, draws=draws, progress=session.progress
    )
    if as_json:
        print((output / "sweep.json").read_text(encoding="utf-8").rstrip())
    else:
        show(found)
    if not any(point.size for point in found.points):
        raise EvaluationError(f"every point failed, the first with: {found.points[0].reason}")
