"""The papers' relations on models that can be trained here, in one run.

    python tools/reproduce.py                # all sections, three seeds; goes on where it stopped
    python tools/reproduce.py --only wanda   # one section

The language model is the packaged checkpoint, of which every seed has its own draw of calibration
text; the images are scikit-learn's digits, for which every seed trains a network of its own, as it
does a mixture of experts. What is measured is held out: neither trained on nor calibrated with.
Rows are kept in ``out/reproduce.jsonl`` and the tables written to ``tools/REPRODUCE.md``.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_scop import RATIOS, STATES, of_digits
from heldout import Study, held_out
from mixture import Mixture
from rich.console import Console
from rich.progress import Progress
from train_reference import Corpus, digest

import graphprune as gp
from graphprune import reference
from graphprune.criteria import ScoringContext, criterion
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.cost import Costs
from graphprune.selection.selector import lowest_units
from graphprune.selection.targets import target_groups

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
TABLES = HERE / "REPRODUCE.md"
SEEDS = 3
SAMPLES = 32
"""Windows of 128 tokens in each draw of calibration text."""
TRAINING_BYTES = 1_500_000

Measure = partial[float]
"""What a cell measures: a function of this module that is called with a seed, and its arguments."""

_DRAWN = re.compile(
    "recover|reconstruct|taylor|wanda|sparsegpt|obs|gate|random|aligned|loss|without|accur|fold"
    "|experts"
)
"""What depends on the draw of calibration text; all else is measured once."""


# -- the language model ---------------------------------------------------------------------------


@cache
def study() -> Study:
    """Return the packaged checkpoint with its draws of calibration text, once for each process."""
    return Study.of_reference(SEEDS, SAMPLES)


@cache
def dense() -> float:
    """Return the held-out loss of the packaged checkpoint, nats per token."""
    return math.log(held_out(study().program))


def after(passes: str, seed: int) -> float:
    """How much a pipeline raises the held-out loss."""
    given = study()
    pipeline = gp.Pipeline.parse(passes)
    result = pipeline.run(given.program, calibration=given.draws[seed], seed=seed, quiet=True)
    return math.log(held_out(result.program)) - dense()


def without_heads(order: str, count: int, seed: int) -> float:
    """How much the loss rises when `count` heads of each attention go in an order."""
    given = study()
    coupling = gp.analyze(given.program)
    groups = target_groups(coupling, "kv-heads")
    context = ScoringContext(
        given.program, coupling, groups, calibration=given.draws[seed], seed=seed
    )
    scores = criterion("random" if order == "random" else "gate").scores(context)
    sign = -1 if order == "reverse" else 1
    cuts = [group.cut(lowest_units(sign * scores[group.name], count)) for group in groups]
    plan = Plan((Step(given.program.fingerprint(), tuple(cuts)),))
    return math.log(held_out(gp.apply(given.program, plan))) - dense()


def parameters_of(ratio: float) -> float:
    """Return the part of the parameters that the same ratio of all FFN units and KV heads holds."""
    coupling = gp.analyze(study().program)
    groups = [g for target in ("ffn", "kv-heads") for g in target_groups(coupling, target)]
    costs = Costs(coupling)
    left = costs.after("params", {group.name: int(group.size * ratio) for group in groups})
    return 1 - left / costs.after("params", {})


def training_text() -> Path:
    """Text of the standard library that is not held out, written once."""
    path = OUT / "training.txt"
    if not path.exists():
        card = (reference.checkpoint_dir() / "README.md").read_text()
        texts = Corpus.of_standard_library().train
        chosen, size = [], 0
        for name in sorted(texts, key=digest):
            if f"`{name}`" not in card and size < TRAINING_BYTES:
                chosen.append(texts[name])
                size += len(texts[name])
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(chosen), encoding="utf-8")
    return path


# -- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """What a paper found or what is aimed at: means that rise, or one at most a part of another."""

    claim: str
    terms: tuple[tuple[str, str], ...]
    """Row and column of each mean."""
    most: float | None = None
    """The first is at most so many times the second; None: they rise in this order."""
    falling: bool = False

    def holds(self, means: Mapping[tuple[str, str], float]) -> bool:
        """Whether the means say so."""
        values = [means[term] for term in self.terms]
        if self.most is not None:
            return values[0] <= self.most * values[1]
        return values == sorted(values, reverse=self.falling)

    def told(self, means: Mapping[tuple[str, str], float], unit: str) -> str:
        """Write the means side by side, and the verdict."""
        if any(term not in means for term in self.terms):
            return "not measured |"
        names = [row if len({r for r, _ in self.terms}) > 1 else c for row, c in self.terms]
        found = [
            f"{name} {unit.format(means[term])}"
            for name, term in zip(names, self.terms, strict=True)
        ]
        text = ", ".join(found)
        if self.most is not None:
            first, second = (means[term] for term in self.terms)
            text += f": {first / second:.2f}"
        return f"{text} | {'yes' if self.holds(means) else 'no'}"


@dataclass(frozen=True)
class Section:
    """One table: what each row and column measures, and the relations to look for in it."""

    title: str
    text: str
    cells: Mapping[tuple[str, str], Measure]
    relations: tuple[Relation, ...] = ()
    base: str | None = None
    """The row that the others are given as shares of."""
    unit: str = "{:.3f}"

    def rows(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(column for _, column in self.cells))


def below(claim: str, column: str, *rows: str) -> Relation:
    """Claim that the means of `rows` rise in this order."""
    return Relation(claim, tuple((row, column) for row in rows))


def share(column: str, row: str, of: str, most: float, at: str = "") -> Relation:
    """Aim for the mean of a row to be at most so much of another's, `at` a column of its own."""
    claim = f"target: {row} ({column}) at most {most:g} times {of} ({at or column})"
    return Relation(claim, ((row, column), (of, at or column)), most)


def wanda() -> Section:
    """Single weights set to zero."""
    patterns = {"30 %": "0.3", "50 %": "0.5", "60 %": "0.6", "4:8": "4:8", "2:4": "2:4"}
    rows = ("sparsegpt", "wanda", "wanda-variant", "magnitude", "random")
    cells = {
        (row, column): partial(after, f"sparsify{{pattern={pattern} criterion={row}}}")
        for row in rows
        for column, pattern in patterns.items()
        if not (row == "wanda-variant" and ":" in pattern)
    }
    return Section(
        "Wanda: single weights set to zero",
        "Sun et al. 2306.11695, tables 3 and 4. Nothing is trained afterwards.",
        cells,
        (
            below("Wanda below magnitude below random", "50 %", "wanda", "magnitude", "random"),
            below("the same at 2:4", "2:4", "wanda", "magnitude", "random"),
            below("SparseGPT, which updates weights, below Wanda", "50 %", "sparsegpt", "wanda"),
            Relation(
                "Wanda: unstructured below 4:8 below 2:4",
                (("wanda", "50 %"), ("wanda", "4:8"), ("wanda", "2:4")),
            ),
        ),
        base="magnitude",
    )


def llm_pruner() -> Section:
    """Whole units by criterion, and what low-rank training recovers."""
    tune = f",recover{{steps=50 batch=16 micro=16 length=128 lr=0.003 text={training_text()}}}"
    cells: dict[tuple[str, str], Measure] = {}
    for row in ("taylor", "taylor-vector", "l2", "random"):
        for ratio in ("0.2", "0.4"):
            prune = f"prune{{target=ffn,kv-heads params={ratio} scope=local criterion={row}}}"
            cells[row, f"-{float(ratio):.0%}"] = partial(after, prune)
            cells[row, f"-{float(ratio):.0%}, LoRA"] = partial(after, prune + tune)
    cells = dict(sorted(cells.items(), key=lambda cell: "LoRA" in cell[0][1]))
    return Section(
        "LLM-Pruner: whole units, before and after LoRA",
        "Ma et al. 2305.11627, tables 1 and 8 and section 4.3: FFN units and KV heads with their "
        "query heads, the same part of each until so many of all parameters are gone; LoRA of rank "
        "8 for 50 steps of 2,048 tokens.",
        cells,
        tuple(
            below(f"Taylor below L2 ({column})", column, "taylor", "l2")
            for column in ("-20%", "-40%", "-20%, LoRA", "-40%, LoRA")
        )
        + tuple(
            Relation(f"LoRA recovers ({ratio})", (("taylor", f"{ratio}, LoRA"), ("taylor", ratio)))
            for ratio in ("-20%", "-40%")
        ),
        base="taylor",
    )


def heads() -> Section:
    """Heads removed by importance, at random, and the most important first."""
    cells = {
        (row, f"{count} of 8"): partial(without_heads, row, count)
        for row in ("importance", "random", "reverse")
        for count in range(1, 8)
    }
    return Section(
        "Sixteen heads: curves of removal",
        "Michel et al. 1905.10650, figure 3: heads of every attention go by the gradient of their "
        "gates (criterion `gate`), at random, and the most important first.",
        cells,
        tuple(
            below(
                f"importance below random below reverse ({count} of 8)",
                f"{count} of 8",
                *("importance", "random", "reverse"),
            )
            for count in (2, 4)
        ),
        base="importance",
    )


def gqa() -> Section:
    """KV heads merged, before and after uptraining."""
    train = (
        "recover{method=full steps=50 batch=16 micro=16 length=128 lr=0.001 "
        f"text={training_text()}}}"
    )
    cells: dict[tuple[str, str], Measure] = {}
    for groups in (4, 2, 1):
        for init in ("aligned", "mean", "first", "random"):
            merge = f"merge-kv-heads{{groups={groups} init={init}}}"
            cells[init, f"to {groups}"] = partial(after, merge)
            cells[init, f"to {groups}, uptrained"] = partial(after, f"{merge},{train}")
        for init, order in (("mean", "similarity"), ("aligned", "contiguous")):
            merge = f"merge-kv-heads{{groups={groups} init={init} order={order}}}"
            cells[f"{init}, {order}", f"to {groups}"] = partial(after, merge)
    cells = dict(sorted(cells.items(), key=lambda cell: "uptrained" in cell[0][1]))
    for groups in (4, 2, 1):
        cells["not merged", f"to {groups}, uptrained"] = partial(after, train)
    return Section(
        "GQA and MQA: heads merged, before and after uptraining",
        "Ainslie et al. 2305.13245, figures 4 and 5: 8 KV heads to 4, 2 and 1; uptraining of all "
        "weights for 50 steps of 2,048 tokens, as the control that keeps its heads.",
        cells,
        (
            *(
                below(
                    f"mean below first below random (to {groups}, uptrained)",
                    f"to {groups}, uptrained",
                    *("mean", "first", "random"),
                )
                for groups in (4, 2, 1)
            ),
            share("to 4", "aligned", "mean", 0.2),
            share("to 2", "aligned", "mean", 0.3),
            share("to 1", "aligned", "mean", 0.35),
            *(
                below(
                    f"target: aligned no worse than mean (to {groups}, uptrained)",
                    f"to {groups}, uptrained",
                    *("aligned", "mean"),
                )
                for groups in (4, 2, 1)
            ),
        ),
        base="mean",
    )


# -- the mixture of experts -----------------------------------------------------------------------


@cache
def mixture(seed: int) -> Mixture:
    """Return the mixture of a seed, trained once and kept."""
    return Mixture.trained(OUT / f"mixture-{seed}", seed)


def after_experts(passes: str, seed: int) -> float:
    """How much a pipeline raises the held-out loss of a mixture, in nats per byte."""
    given = mixture(seed)
    pipeline = gp.Pipeline.parse(passes)
    result = pipeline.run(given.program, calibration=given.draw, seed=seed, quiet=True)
    return given.loss(result.program.to_module()) - given.dense


def experts() -> Section:
    """Experts of a mixture."""
    rows = ("reap", "frequency", "aimer", "l2", "random")
    ratios = (0.25, 0.5)
    cells = {
        (row, f"-{ratio:.0%}"): partial(
            after_experts, f"prune{{target=experts ratio={ratio} criterion={row}}}"
        )
        for row in rows
        for ratio in ratios
    }
    anew = "prune{target=experts ratio=0.5 criterion=reap steps=4}"
    cells["reap, 4 steps", "-50%"] = partial(after_experts, anew)
    for (row, column), cell in list(cells.items()):
        if row in ("reap", "frequency", "l2"):
            (cut,) = cell.args
            cells[f"{row}, refitted", column] = partial(after_experts, cut + ",reconstruct")
    return Section(
        "REAP: experts of a mixture",
        "Lasby et al. 2510.13999; AIMER, 2603.18492, needs no data. 3 layers of 8 experts of which "
        "a token goes to 2, trained on bytes for 600 steps; every seed with a mixture of "
        "its own (`tools/mixture.py`), calibrated with 32 windows of 128 bytes of what it was "
        "trained on. Nothing is trained afterwards. Increase in nats per byte.",
        cells,
        (
            below("REAP below frequency (-25%)", "-25%", "reap", "frequency"),
            share("-50%", "reap", "frequency", 0.5),
            share("-50%", "reap, refitted", "frequency", 0.5),
        ),
        base="frequency",
    )


def depth() -> Section:
    """Blocks of the packaged model, and what takes over a linear part of one."""
    cells = {
        (row, "1 of 4 blocks"): partial(after, f"prune-depth{{count=1 criterion=cosine{fold}}}")
        for row, fold in (
            ("cosine", ""),
            ("cosine, fold=linear", " fold=linear"),
            ("cosine, fold=stream", " fold=stream"),
        )
    }
    return Section(
        "ReplaceMe: a block, and what takes over a linear part of it",
        "Men et al. 2403.03853 (the block that turns the stream least) and Shopkhoev et al. "
        "2505.02819 (the fold). Nothing is trained afterwards.",
        cells,
        (
            share("1 of 4 blocks", "cosine, fold=linear", "cosine", 0.5),
            share("1 of 4 blocks", "cosine, fold=stream", "cosine", 0.5),
        ),
        base="cosine",
    )


@cache
def digits(seed: int) -> dict[str, float]:
    """Accuracies of one network without channels, by criterion, ratio and state."""
    return of_digits(seed)


def accuracy(row: str, column: str, seed: int) -> float:
    """Per cent of held-out digits told right."""
    return digits(seed)[f"{row} | {column}"]


def scop() -> Section:
    """Channels of a network for digits."""
    rows = ("scop", "scop-gamma", "scop-beta", "l2", "random", "scop, reversed")
    columns = [f"-{ratio:.0%} {state}" for ratio in RATIOS for state in STATES[1:]]
    cells = {(row, column): partial(accuracy, row, column) for row in rows for column in columns}

    def over(other: str) -> Relation:
        terms = (("scop", "-50% norms anew"), (other, "-50% norms anew"))
        return Relation(f"SCOP over {other} (-50%, norms anew)", terms, falling=True)

    return Section(
        "SCOP: channels of a network for digits",
        "Tang et al. 2010.10732, tables 1 and 4: accuracy in per cent on held-out digits, every "
        "seed with a network of its own; norms taken anew, and after an epoch of training. The "
        "published controls are |gamma| and beta alone.",
        cells,
        (over("random"), over("l2"), over("scop-gamma")),
        unit="{:.1f}",
    )


def better() -> Section:
    """Recipes that go past the papers, at equal parameters."""
    each = "prune{{{{target={} ratio={{ratio}} {{options}}}}}}"
    plain = ",".join(map(each.format, ("ffn", "kv-heads")))
    anywhere = "prune{{target=ffn,kv-heads params={params} scope=global {options}}}"
    recipes = {
        "taylor": (plain, "criterion=taylor"),
        "taylor, 4 steps": (plain, "criterion=taylor steps=4"),
        "wanda": (plain, "criterion=wanda"),
        "l2": (plain, "criterion=l2"),
        "random": (plain, "criterion=random"),
        "obs": (plain, "criterion=obs"),
        "taylor, global": (anywhere, "criterion=taylor"),
        "taylor, global by loss": (anywhere, "criterion=taylor normalize=loss"),
        "obs, global by loss": (anywhere, "criterion=obs normalize=loss"),
    }
    cells: dict[tuple[str, str], Measure] = {}
    for row, (recipe, options) in recipes.items():
        for ratio in (0.25, 0.5):
            passes = recipe.format(ratio=ratio, params=parameters_of(ratio), options=options)
            cells[row, f"-{ratio:.0%}"] = partial(after, passes)
            cells[row, f"-{ratio:.0%}, reconstruct"] = partial(after, passes + ",reconstruct")
    return Section(
        "Better than the papers: refitting and global allocation",
        "FFN units and KV heads; the same part of each, or as many parameters from wherever they "
        "are missed least. Nothing is trained afterwards. The base is LLM-Pruner's plain recipe.",
        cells,
        tuple(
            share(f"-{ratio}, reconstruct", row, "taylor", 0.45, f"-{ratio}")
            for row in ("obs", "obs, global by loss")
            for ratio in ("25%", "50%")
        ),
        base="taylor",
    )


SECTIONS: dict[str, Callable[[], Section]] = {
    "wanda": wanda,
    "llm-pruner": llm_pruner,
    "heads": heads,
    "scop": scop,
    "gqa": gqa,
    "better": better,
    "experts": experts,
    "depth": depth,
}


# -- running --------------------------------------------------------------------------------------


Key = tuple[str, str, str, int]
"""Section, row, column and seed."""


@dataclass
class Rows:
    """What was measured, as JSON lines."""

    path: Path
    values: dict[Key, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Rows:
        """Return the rows of an earlier run, if there was one."""
        found = cls(path)
        if path.exists():
            for line in path.read_text().splitlines():
                *key, value = json.loads(line)
                found.values[tuple(key)] = value
        return found

    def add(self, key: Key, value: float) -> None:
        """Keep one."""
        self.values[key] = value
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([*key, value]) + "\n")


def measure(section: str, row: str, column: str, seed: int) -> float:
    """One cell, in a process of the pool."""
    torch.set_num_threads(1)
    return SECTIONS[section]().cells[row, column](seed)


def identity(cell: Measure) -> tuple[object, ...]:
    """Equal for cells that measure the same."""
    return cell.func.__name__, *cell.args


def seeds_of(cell: Measure, seeds: int) -> range:
    """Return the seeds that a cell is measured for: one where nothing is drawn."""
    return range(seeds if _DRAWN.search(" ".join(map(str, identity(cell)))) else 1)


def means_of(name: str, section: Section, rows: Rows, seeds: int) -> dict[tuple[str, str], float]:
    """Return the mean of every cell that was measured."""
    found = {}
    for (row, column), cell in section.cells.items():
        drawn = (rows.values.get((name, row, column, seed)) for seed in seeds_of(cell, seeds))
        if values := [value for value in drawn if value is not None]:
            found[row, column] = statistics.mean(values)
    return found


def headline(rows: Rows, seeds: int) -> list[str]:
    """Every relation with its means, for the README."""
    lines = ["| | relation of the paper, or target | here | holds |", "|---|---|---|---|"]
    for name, make in SECTIONS.items():
        section = make()
        means = means_of(name, section, rows, seeds)
        title = section.title.partition(":")[0]
        for relation in section.relations:
            lines.append(f"| {title} | {relation.claim} | {relation.told(means, section.unit)} |")
            title = ""
    return lines


def table(name: str, section: Section, rows: Rows, seeds: int) -> list[str]:
    """Write a section in Markdown."""
    found: dict[tuple[str, str], list[float]] = {}
    for row, column in section.cells:
        drawn = seeds_of(section.cells[row, column], seeds)
        values = [rows.values.get((name, row, column, seed)) for seed in drawn]
        found[row, column] = [value for value in values if value is not None]
    means = means_of(name, section, rows, seeds)

    def cell(row: str, column: str) -> str:
        values = found.get((row, column), [])
        if not values:
            return ""
        text = section.unit.format(means[row, column])
        if len(values) > 1:
            text += f" ± {section.unit.format(statistics.stdev(values))}"
        of = means.get((section.base or "", column))
        return f"{text} ({means[row, column] / of:.2f})" if of else text

    columns = section.columns()
    lines = [f"## {section.title}", "", section.text, ""]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {row} | {' | '.join(cell(row, column) for column in columns)} |"
        for row in section.rows()
    ]
    return [*lines, ""]


def report(rows: Rows, seeds: int) -> str:
    """All tables."""
    lines = [
        "# What the papers found, here",
        "",
        "Written by `python tools/reproduce.py`; see there for what is measured. Increase of the "
        f"held-out loss in nats per token over the packaged checkpoint ({dense():.3f}), mean and "
        f"standard deviation over {seeds} seeds; in brackets its ratio to the base row of the "
        "table. Digits: accuracy. Every draw is 32 windows of 128 tokens, cut anywhere and without "
        "a first token, as the checkpoint was trained; the loss is measured on such windows too.",
        "",
    ]
    lines += [*headline(rows, seeds), ""]
    for name, section in SECTIONS.items():
        lines += table(name, section(), rows, seeds)
    return "\n".join(lines)


def main(
    seeds: Annotated[int, typer.Option(min=1, max=SEEDS, help="How many seeds.")] = SEEDS,
    only: Annotated[str, typer.Option(help="Sections, joined by commas; all by default.")] = "",
    only_report: Annotated[bool, typer.Option("--report", help="Only make the tables.")] = False,
    again: Annotated[bool, typer.Option(help="Measure the chosen sections anew.")] = False,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Measure what is missing, and write the tables."""
    chosen = [] if only_report else only.split(",") if only else list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise typer.BadParameter(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    rows = Rows.read(OUT / "reproduce.jsonl")
    training_text()
    wanted: dict[tuple[object, ...], list[Key]] = {}
    for name in chosen:
        for (row, column), cell in SECTIONS[name]().cells.items():
            for seed in seeds_of(cell, seeds):
                if again or (name, row, column, seed) not in rows.values:
                    key = (name, row, column, seed)
                    wanted.setdefault((*identity(cell), seed), []).append(key)
    console = Console(stderr=True)
    with ProcessPoolExecutor(workers) as pool, Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(wanted))
        futures = {pool.submit(measure, *keys[0]): keys for keys in wanted.values()}
        for future in as_completed(futures):
            for key in futures[future]:
                try:
                    rows.add(key, future.result())
                except gp.GraphPruneError as error:
                    console.print(f"{' / '.join(map(str, key))}: {error}", style="red")
            progress.advance(task)
    TABLES.write_text(report(rows, seeds))
    console.print(f"wrote {TABLES}")


if __name__ == "__main__":
    typer.run(main)
