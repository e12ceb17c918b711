"""Verbs that measure, and the one that writes: `evaluate`, `sensitivity`, `sweep`, `generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
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
    Seed,
)
from graphprune.cli.session import Session, verb
from graphprune.errors import CalibrationError, EvaluationError, UsageError
from graphprune.io.atomic import as_json as to_json

if TYPE_CHECKING:
    from graphprune.backends.onnx.runtime.runner import Generation

_SAMPLING = "Choice of tokens"
_RUNTIME = "ONNX Runtime"


@verb("graphprune evaluate DIR --text heldout.txt")
def evaluate(
    session: Session,
    directory: Checkpoint,
    heldout: HeldOutOptions,
    loading: LoadOptions,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a causal language model on a text."""
    from graphprune.evaluation.perplexity import perplexity

    require_text(heldout.text, EvaluationError)
    found = perplexity(
        session.load(directory, loading),
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
    from graphprune.evaluation.ablation import sensitivity, text_batches
    from graphprune.evaluation.perplexity import text_windows
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
        windows = text_windows(
            program,
            heldout.path,
            resolve(heldout.tokenizer or directory),
            length=heldout.length,
            max_tokens=heldout.max_tokens,
            first_token=heldout.first_token,
        )
        batches = text_batches(program, windows, heldout.batch_size)
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
    """Measure perplexity against size for several recipes: a table, JSON and a picture."""
    from graphprune.evaluation.sweep import HeldOut, sweep
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
    measured_on = HeldOut(
        heldout.path,
        resolve(heldout.tokenizer or directory),
        heldout.length,
        heldout.batch_size,
        heldout.max_tokens,
        heldout.first_token,
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


@verb("graphprune generate PACKAGE --prompt 'Once upon a time'")
def generate(
    session: Session,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="An ONNX package, as 'export-onnx' writes it.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text to continue; may be repeated."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file that is one prompt, or JSON lines with a prompt each."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a text.", min=1)] = 64,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A string that ends a text; may be repeated."),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 chooses the likeliest token; else one is drawn.",
            min=0,
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Draw from so many of the likeliest tokens.", min=1, rich_help_panel=_SAMPLING
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens of this probability.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    seed: Seed = 0,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A provider of ONNX Runtime, as 'cuda'; the package's own if left out.",
            rich_help_panel=_RUNTIME,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the CPU.", min=1, rich_help_panel=_RUNTIME),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts by the model of an ONNX package; one prompt alone is shown as it grows."""
    from graphprune.backends.onnx.runtime.runner import OnnxRunner
    from graphprune.io.text_sources import read_documents

    prompts = list(prompt or ())
    if prompt_file is not None:
        for document in read_documents(prompt_file, UsageError):
            if not isinstance(document, str):
                raise UsageError(f"{prompt_file} holds conversations, and prompts are texts")
            prompts.append(document)
    if not prompts:
        raise typer.BadParameter("there is nothing to continue: give --prompt or --prompt-file")
    runner = OnnxRunner(directory, provider=provider, threads=threads)
    alone = len(prompts) == 1 and not as_json
    found = runner.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if alone else None,
    )
    if as_json:
        rows = [{"prompt": p, **asdict(each)} for p, each in zip(prompts, found, strict=True)]
        print(json.dumps(rows, indent=1))
    elif alone:
        print()
    else:
        for number, (text, each) in enumerate(zip(prompts, found, strict=True), 1):
            print(f"--- {number} of {len(found)}: {_shortened(text)}\n{each.text}")
    if not session.quiet:
        _say_speed(found)


def _shortened(text: str) -> str:
    """Return the end of a prompt, which its continuation follows, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"...{line[-57:]}"


def _say_speed(found: Sequence[Generation]) -> None:
    """Say on standard error how fast a batch was; the first new tokens count with the prompts."""
    for what, count, seconds in (
        ("prompt", sum(each.prompt_tokens for each in found), found[0].prompt_seconds),
        (
            "new",
            sum(len(each.tokens) - 1 for each in found),
            max(each.decode_seconds for each in found),
        ),
    ):
        if count:
            print(f"{what}: {count} tokens, {count / seconds:.1f} per second", file=sys.stderr)
