"""The command line: ``graphprune VERB``.

Exit status 0; 1 when something is refused or fails, with one line on standard error; 2 when the
command line itself makes no sense. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.errors import EvaluationError, GraphPruneError, PlanError
from graphprune.io import reference
from graphprune.io.version import __version__
from graphprune.pipeline.instruments import Instrument, PassPosition
from graphprune.transforms.apply import apply_plan

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from graphprune.backends.onnx.runtime.runner import Generation
    from graphprune.calibration.data import Calibration
    from graphprune.io.progress import DisplayFactory
    from graphprune.ir.program import Program
    from graphprune.pipeline.pass_base import Context, Outcome
    from graphprune.pipeline.pipeline import Pipeline
    from graphprune.plan.plan import Plan

WIDTH = 100
"""Columns of what is printed where there is no terminal."""

TRACEBACK = "GRAPHPRUNE_TRACEBACK"
"""The environment variable that asks for tracebacks of errors."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the custom of shells."""

_KINDS = {
    "plain": "a Hugging Face checkpoint",
    "remote-code": "a Hugging Face checkpoint that needs trust_remote_code=True",
    "none": "an archive that graphprune.load reads, since no Hugging Face checkpoint can hold it",
}
"""How the result of a pipeline is written, by `CheckpointForm.kind`."""

app = typer.Typer(
    name="graphprune",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes neural networks smaller: a checkpoint goes in, a smaller verified one comes out.",
)


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        app(prog_name="graphprune")
    except GraphPruneError as error:
        _fail(error, str(error))
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as status:
        if status.code != INTERRUPTED:
            raise
        _interrupted()  # typer swallows the interrupt and says nothing
    except Exception as error:  # noqa: BLE001 - whatever else it is, a user gets one line
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        _fail(error, f"internal error, please report it: {reason} (--traceback shows where)")


# -- options that verbs share -------------------------------------------------------------------


class Format(StrEnum):
    """How `inspect` prints."""

    text = "text"
    json = "json"
    dot = "dot"
    graphml = "graphml"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"graphprune {__version__}")
        raise typer.Exit


def _ask_traceback(asked: bool) -> None:
    if asked:
        os.environ[TRACEBACK] = "1"


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help=f"A Hugging Face directory, or one that graphprune wrote; '{reference.NAME}' is the "
        "small model that comes with graphprune.",
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="OUT", help="A directory to make; it appears whole."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary.")]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback",
        callback=_ask_traceback,
        help=f"Show where an error comes from; so does {TRACEBACK}=1.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="The largest relative error; the verifier's own if left out."),
]
HeldOutText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A text, JSON lines or NAME:SPLIT:COLUMN of a data set; the packaged held-out text "
        "if left out.",
    ),
]
Length = Annotated[int, typer.Option("--length", help="Tokens of each window.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Use no more of the text.", min=1)
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Windows at once.", min=1)]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="A text, JSON lines or NAME:SPLIT:COLUMN of a data set.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Windows of calibration text.", min=1)]
TokenizerDirectory = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="DIR", help="Where the tokenizer is, if not in DIR."),
]


@app.callback()
def prepare(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Makes neural networks smaller: a checkpoint goes in, a smaller verified one comes out."""
    # Read when transformers and its tokenizers are imported, which a verb does later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not _wants_traceback():
        logging.getLogger("torch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


# -- verbs that look ----------------------------------------------------------------------------


@app.command()
def inspect(
    directory: Checkpoint,
    format: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.text,
    html: Annotated[
        Path | None, typer.Option(help="A page to write: all of it, to look into with a browser.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json to show on the page: what goes, what is left.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="A file of 'prune{scores=FILE}' to draw histograms of.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="A .png, .svg or .pdf: layers around --plan, or histograms of --scores."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Print one group.")] = None,
    weight: Annotated[str | None, typer.Option(help="Print the dimensions of one weight.")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Print the weights by module.")] = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Print what can be pruned: the coupled groups and the axis types of the weights."""
    from graphprune.analysis.coupling import analyze
    from graphprune.backends.load import shapes_of
    from graphprune.errors import CaptureError
    from graphprune.io.progress import display_factory
    from graphprune.report.charts import draw_scores, draw_sizes
    from graphprune.report.html_page import bare_page, page
    from graphprune.report.overview import module_tree, overview, overview_json

    if plan is not None and html is None and picture is None:
        raise typer.BadParameter("a plan is shown on a page or picture: give --html or --picture")
    if picture is not None and (plan is None) == (scores is None):
        raise typer.BadParameter("a picture is of a --plan or of --scores: give one of them")
    progress = display_factory(quiet=quiet)
    try:
        program = _load(directory, progress)
    except CaptureError as error:
        if html is None:
            raise
        _write_page(html, bare_page(directory, shapes_of(_resolve(directory)), str(error)))
        print(f"graphprune: {error}", file=sys.stderr)
        return
    if picture is not None:
        if plan is not None:
            draw_sizes(picture, program, _plan(plan))
        else:
            assert scores is not None
            draw_scores(picture, scores, program)
        print(f"wrote {picture}")
        if html is None:
            return
    with _working(progress, "analysing"):
        coupling = analyze(program)
    if html is not None:
        with _working(progress, "writing the page"):
            _write_page(html, page(coupling, directory, _plan(plan) if plan else None))
    elif group is not None:
        print(coupling.group(group))
    elif weight is not None:
        for dim in range(program.weight(weight).ndim):
            print(coupling.explain(weight, dim))
    elif tree:
        _show(module_tree(directory, program, coupling))
    elif format is Format.text:
        _show(overview(directory, program, coupling))
    else:
        written = {
            Format.json: lambda: overview_json(coupling),
            Format.dot: coupling.to_dot,
            Format.graphml: coupling.to_graphml,
        }
        print(written[format]())


def _write_page(path: Path, text: str) -> None:
    from graphprune.io.atomic import staged_file

    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


@app.command(context_settings={"ignore_unknown_options": True})
def explain(
    directory: Checkpoint,
    weight: Annotated[str, typer.Argument(metavar="WEIGHT", help="A weight's dotted name.")],
    dim: Annotated[int, typer.Argument(metavar="DIM", help="Its dimension; -1 is the last.")],
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Say what one dimension of a weight is coupled with, or why it cannot be pruned."""
    from graphprune.analysis.coupling import analyze
    from graphprune.analysis.coupling_paths import chain_text
    from graphprune.io.progress import display_factory

    progress = display_factory(quiet=quiet)
    program = _load(directory, progress)
    with _working(progress, "analysing"):
        coupling = analyze(program)
    print(coupling.explain(weight, dim))
    name = program.aliases.get(weight, weight)
    dim %= program.weight(name).ndim
    for group in coupling.groups:
        if any(member.weight == name and member.dim == dim for member in group.members):
            print(f"\n{group}")
            other = next((each for each in reversed(group.weights()) if each != name), None)
            if other is not None:
                print(chain_text(coupling, group.name, name, other))


@app.command()
def evaluate(
    directory: Checkpoint,
    text: HeldOutText = None,
    tokenizer: TokenizerDirectory = None,
    length: Length = 256,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 4,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Measure the perplexity of a causal language model on a text."""
    from graphprune.evaluation.perplexity import perplexity
    from graphprune.io.progress import display_factory

    progress = display_factory(quiet=quiet)
    path = text or reference.heldout_text()
    found = perplexity(
        _load(directory, progress),
        path,
        _resolve(tokenizer or directory),
        length=length,
        max_tokens=max_tokens,
        batch_size=batch_size,
        progress=progress or False,
    )
    print(f"perplexity {found.perplexity:.4f}")
    print(f"loss       {found.loss:.4f} nats per token")
    print(f"tokens     {found.tokens} of {path.name}, in windows of {found.length}")


@app.command()
def sensitivity(
    directory: Checkpoint,
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
            help="Remove units in N runs of neighbours; one by one if left out, and in 64 runs "
            "where a group has more units than that.",
        ),
    ] = None,
    keep_one: Annotated[
        bool, typer.Option(help="Also remove all units of a group but the best one.")
    ] = True,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the effects as JSON.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw them as a heat map: .png, .svg or .pdf."),
    ] = None,
    text: HeldOutText = None,
    tokenizer: TokenizerDirectory = None,
    length: Length = 256,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 4,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Measure what the model loses by each unit, such as each head, one at a time."""
    from graphprune.analysis.coupling import analyze
    from graphprune.evaluation.ablation import sensitivity, text_batches
    from graphprune.evaluation.perplexity import text_windows
    from graphprune.io.atomic import staged_file
    from graphprune.io.progress import display_factory
    from graphprune.report.plots import check_format

    progress = display_factory(quiet=quiet)
    if picture is not None:
        check_format(picture)
    with ExitStack() as stack:  # places that cannot be written are refused first
        json_file = stack.enter_context(staged_file(json)) if json else None
        picture_file = stack.enter_context(staged_file(picture)) if picture else None
        program = _load(directory, progress)
        windows = text_windows(
            program,
            text or reference.heldout_text(),
            _resolve(tokenizer or directory),
            length=length,
            max_tokens=max_tokens,
        )
        batches = text_batches(program, windows, batch_size)
        with _working(progress, "analysing"):
            coupling = analyze(program)
        found = sensitivity(
            coupling, batches, group, blocks=blocks, keep_one=keep_one, progress=progress
        )
        if json_file is not None:
            json_file.write_text(found.to_json() + "\n", encoding="utf-8")
        if picture_file is not None:
            found.picture(picture_file)
    _show(found)


@app.command()
def passes(traceback: Traceback = False) -> None:
    """List the passes with their options."""
    from rich.table import Table
    from rich.text import Text

    from graphprune.pipeline import registry

    table = Table.grid(padding=(0, 2, 0, 0))
    for info in registry.listing():
        table.add_row(Text(info.name, style="bold"), Text(info.summary))
        for option, description in info.options:
            default = "" if option.required else f"  [{option.name}={option.write(option.default)}]"
            table.add_row(
                Text(f"  {option.name}"), Text(f"{option.type_text}{default}\n{description}")
            )
        table.add_row()
    _console().print(table)


@app.command()
def operators(traceback: Traceback = False) -> None:
    """List the operators that have a rule; every other one freezes what it touches."""
    from rich.table import Table
    from rich.text import Text

    from graphprune.analysis.operators import table

    rows = table()
    shown = Table(show_edge=False, pad_edge=False)
    for column in rows[0]:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row.values()))
    _show(shown)


# -- verbs that write ---------------------------------------------------------------------------


@app.command()
def run(
    directory: Checkpoint,
    passes: Annotated[
        str,
        typer.Option(
            help="A pipeline such as 'prune{target=ffn ratio=0.25},verify', or a .yaml file."
        ),
    ],
    output: Output,
    calibration: CalibrationText = None,
    tokenizer: TokenizerDirectory = None,
    samples: Samples = 10,
    length: Annotated[int, typer.Option(help="Tokens of each of them.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of whatever is random.")] = 0,
    verify_each: Annotated[
        bool, typer.Option("--verify-each", help="Verify after every pass that changes sizes.")
    ] = False,
    print_after: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Print the graph after these passes; may be repeated."),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(metavar="N", help="Run only the first N passes that change.", min=0),
    ] = None,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Run a pipeline: write a smaller checkpoint, its plan and a report."""
    from graphprune.io.atomic import staged_directory
    from graphprune.io.progress import display_factory

    pipeline = _pipeline(passes)
    progress = display_factory(quiet=quiet)
    with staged_directory(output) as folder, ExitStack() as stack:
        program = _load(directory, progress)
        result = pipeline.run(
            program,
            calibration=_calibration(
                [pipeline], directory, calibration, tokenizer, samples, length, seed
            ),
            output=folder,
            seed=seed,
            verify_each=verify_each,
            print_after=tuple(print_after or ()),
            stop_after=stop_after,
            instruments=[_Spinner(progress, stack)],
            quiet=progress is None,
        )
        kind = _write(result.program, result.plan, folder, progress)
        report = result.report.to_json().replace(f"{folder}{os.sep}", "")
        (folder / "report.json").write_text(report, encoding="utf-8")
    if not quiet:
        _show(result.report)
        _say_written(output, kind)


@app.command()
def sweep(
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
    ratios: Annotated[
        str, typer.Option(help="Numbers and ranges a..b or a..b..step, with commas between.")
    ] = "0.1..0.6",
    steps: Annotated[int, typer.Option(help="Ratios of a range a..b.", min=2)] = 6,
    seeds: Annotated[int, typer.Option(help="Draws of calibration text, and seeds.", min=1)] = 1,
    calibration: CalibrationText = None,
    samples: Samples = 10,
    calibration_length: Annotated[
        int, typer.Option(help="Tokens of each window of calibration text.", min=1)
    ] = 64,
    text: HeldOutText = None,
    tokenizer: TokenizerDirectory = None,
    length: Length = 256,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 4,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Measure perplexity against size for several recipes: a table, JSON and a picture."""
    from graphprune.evaluation.sweep import HeldOut, Recipe, read_ratios, sweep
    from graphprune.io.progress import display_factory

    chosen = read_ratios(ratios, steps)
    recipes = [Recipe.read(text) for text in dict.fromkeys(passes)]
    pipelines = [recipe.at(ratio) for recipe in recipes for ratio in chosen]
    draws = [
        _calibration(
            pipelines, directory, calibration, tokenizer, samples, calibration_length, seed
        )
        for seed in range(seeds)
    ]
    heldout = HeldOut(
        text or reference.heldout_text(),
        _resolve(tokenizer or directory),
        length,
        batch_size,
        max_tokens,
    )
    progress = display_factory(quiet=quiet)
    found = sweep(
        _load(directory, progress),
        recipes,
        chosen,
        heldout,
        output,
        draws=draws,
        progress=progress,
    )
    _show(found)
    if not any(point.size for point in found.points):
        raise EvaluationError(f"every point failed, the first with: {found.points[0].reason}")


@app.command()
def apply(
    directory: Checkpoint,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json that 'run' wrote.")],
    output: Output,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Carry a plan out on a fresh copy of the model that it was made for."""
    from graphprune.io.atomic import staged_directory
    from graphprune.io.progress import display_factory

    chosen = _plan(plan)
    progress = display_factory(quiet=quiet)
    with staged_directory(output) as folder:
        program = _load(directory, progress)
        with _working(progress, "applying the plan"):
            smaller = apply_plan(program, chosen)
        kind = _write(smaller, chosen, folder, progress)
    if not quiet:
        _say_written(output, kind)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="PLAN_A", help="A plan.json.")],
    second: Annotated[Path, typer.Argument(metavar="PLAN_B", help="Another for the same model.")],
    traceback: Traceback = False,
) -> None:
    """Compare two plans: how many units of each group go, and how many of them in both."""
    from graphprune.report.plan_diff import difference

    _show(difference(_plan(first), _plan(second), first.name, second.name))


@app.command()
def verify(
    directory: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="What 'run', 'apply' or 'export-onnx' wrote, with its plan.json.",
            show_default=False,
        ),
    ] = None,
    tolerance: Tolerance = None,
    provider: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="What runs an ONNX package: a provider of ONNX Runtime, as 'cuda'."
        ),
    ] = "cpu",
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Prove that OUT equals DIR with the removed units set to zero.

    Without OUT, DIR is an ONNX package: its model must give what its program gives.
    """
    from graphprune.io.progress import display_factory
    from graphprune.verification.verify import verify as prove

    progress = display_factory(quiet=quiet)
    if output is None:
        _parity(directory, provider, progress, quiet=quiet)
        return
    plan = _plan(output / "plan.json")
    original, smaller = _load(directory, progress), _load(str(output), progress)
    with _working(progress, "verifying"):
        report = prove(original, plan, smaller, tolerance=tolerance)
    if not quiet:
        print(f"verified: max relative error {report.max_relative_error:.2e}")


@app.command()
def generate(
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
    temperature: Annotated[
        float, typer.Option(help="0 chooses the likeliest token; else one is drawn.", min=0)
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many of the likeliest tokens.", min=1)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A string that ends a text; may be repeated."),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A provider of ONNX Runtime, as 'cuda'; the package's own if left out.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of speed.")] = False,
    traceback: Traceback = False,
) -> None:
    """Continue prompts by the model of an ONNX package; one prompt alone is shown as it grows."""
    from graphprune.backends.onnx.runtime.runner import OnnxRunner
    from graphprune.errors import UsageError
    from graphprune.io.text_sources import read_documents

    prompts = list(prompt or ())
    if prompt_file is not None:
        prompts += read_documents(prompt_file, UsageError)
    if not prompts:
        raise typer.BadParameter("there is nothing to continue: give --prompt or --prompt-file")
    runner = OnnxRunner(directory, provider=provider, threads=threads)
    alone = len(prompts) == 1
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
    print("" if alone else "\n\n".join(str(generation.text) for generation in found))
    if not quiet:
        _say_speed(found)


# -- parts of verbs -----------------------------------------------------------------------------


class _Spinner(Instrument):
    """Shows which pass is at work; an interrupt ends that with `stack`."""

    def __init__(self, progress: DisplayFactory | None, stack: ExitStack) -> None:
        self.progress = progress
        self.stack = stack

    def before_pass(self, position: PassPosition, program: Program, context: Context) -> None:
        self.stack.enter_context(_working(self.progress, str(position)))

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        self.stack.close()

    def on_error(self, position: PassPosition, error: Exception) -> None:
        self.stack.close()


def _parity(directory: str, provider: str, progress: DisplayFactory | None, *, quiet: bool) -> None:
    """Run the model of an ONNX package beside its program, and print a line for each check."""
    from graphprune.backends.onnx.package import verify_package
    from graphprune.backends.onnx.session import provider_name

    with _working(progress, f"running {directory}"):
        ran = verify_package(directory, provider=provider_name(provider))
    if not quiet:
        for check, error in ran.errors.items():
            print(f"{check}: max relative error {error:.2e}")
        for note in ran.notes:
            print(note)


def _resolve(directory: str) -> str:
    return str(reference.checkpoint_dir()) if directory == reference.NAME else directory


def _load(directory: str, progress: DisplayFactory | None) -> Program:
    with _working(progress, f"loading {directory}"):
        from graphprune.backends.load import load

        return load(_resolve(directory))


def _working(
    progress: DisplayFactory | None, what: str
) -> AbstractContextManager[Callable[[float], None]]:
    from graphprune.io.progress import progress_bar

    return progress_bar(progress, what)


def _pipeline(passes: str) -> Pipeline:
    from graphprune.pipeline.pipeline import Pipeline

    if passes.endswith((".yaml", ".yml")):
        return Pipeline.from_yaml(Path(passes))
    return Pipeline.parse(passes)


def _calibration(
    pipelines: Iterable[Pipeline],
    directory: str,
    path: Path | None,
    tokenizer: str | None,
    samples: int,
    length: int,
    seed: int,
) -> Calibration | None:
    from graphprune.calibration.data import Calibration

    needed = any(each.requires_calibration for p in pipelines for each in p.passes)
    if path is None and needed and directory == reference.NAME:
        path = reference.calibration_text()
    if path is None:
        return None
    where = _resolve(tokenizer or directory)
    return Calibration.from_text(path, where, samples=samples, length=length, seed=seed)


def _plan(path: Path) -> Plan:
    from graphprune.plan.plan import Plan

    if not path.is_file():
        raise PlanError(f"{path} does not exist")
    return Plan.load(path)


def _write(program: Program, plan: Plan, folder: Path, progress: DisplayFactory | None) -> str:
    """Write checkpoint and plan into `folder`; return what kind of checkpoint it became."""
    from graphprune.backends.huggingface.save import checkpoint_form

    with _working(progress, "looking for a config"):
        found = checkpoint_form(program)
    kind = _KINDS[found.kind]
    if found.kind != "plain":
        print(f"graphprune: writing {kind}: {found.reason}", file=sys.stderr)
    # In a directory of its own first, since passes may have written into `folder` already.
    inner = folder / ".checkpoint"
    with _working(progress, "writing the checkpoint"):
        program.save(inner) if found.kind == "none" else program.save_pretrained(inner)
    for path in sorted(inner.iterdir()):
        path.rename(folder / path.name)
    inner.rmdir()
    plan.save(folder / "plan.json")
    return kind


# -- printing -----------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _show(what: RenderableType) -> None:
    _console().print(what)


def _say_written(output: Path, kind: str) -> None:
    print(f"{output}: {kind}")


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


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "") not in ("", "0")


def _fail(error: BaseException, message: str) -> None:
    if _wants_traceback():
        raise error
    print(f"graphprune: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _interrupted() -> None:
    print("graphprune: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
