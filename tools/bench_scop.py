"""Accuracy on digits after channels are pruned by SCOP, by its two controls, and otherwise.

    python tools/bench_scop.py --seeds 3           # a network and split for each; a Markdown table
    python tools/bench_scop.py --seeds 3 --text    # the adaptation, on the packaged checkpoint

Every convolution but the first loses the same part of its channels, as in the paper. What is left
is measured as it is, with the statistics of its batch norms taken anew, and after one more epoch
of training. Seeds that were measured before are read from ``out/scop.jsonl``.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from digits import Digits, accuracy, captured, trained, tuned
from heldout import Study, held_out
from rich.console import Console
from rich.progress import track
from torch import Tensor

import graphprune as gp
from graphprune.criteria import Scores, ScoringContext, criterion
from graphprune.criteria.scop import ScopBeta
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.selector import lowest_units
from graphprune.transforms.batch_norms import reestimate

OUT = Path(__file__).resolve().parent.parent / "out" / "scop.jsonl"
RATIOS = (0.25, 0.5, 0.75)
EPOCHS = 1
STATES = ("as it is", "norms anew", "tuned")


class WhiteNoise(ScopBeta):
    """Factors learned beside noise in the place of knockoffs (an ablation of the paper)."""

    @staticmethod
    def controls(
        calibration: gp.Calibration, generator: torch.Generator
    ) -> list[dict[str, Tensor]]:
        """Independent normal pixels."""
        return [
            {name: torch.randn(each.shape, generator=generator) for name, each in batch.items()}
            for batch in calibration
        ]


def main(
    seeds: Annotated[int, typer.Option(help="How many networks, or draws of text.")] = 3,
    text: Annotated[bool, typer.Option(help="The packaged language model instead.")] = False,
) -> None:
    """Measure what is missing, and print the table of all."""
    torch.set_num_threads(1)
    measure, kind = (of_text, "text") if text else (of_digits, "digits")
    OUT.parent.mkdir(exist_ok=True)
    lines = OUT.read_text(encoding="utf-8").splitlines() if OUT.exists() else []
    rows = {(row["kind"], row["seed"]): row for row in map(json.loads, lines)}
    missing = [seed for seed in range(seeds) if (kind, seed) not in rows]
    for seed in track(missing, "measuring", console=Console(stderr=True)):
        rows[kind, seed] = {"kind": kind, "seed": seed, **measure(seed)}
        OUT.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()), encoding="utf-8")
    print(table([rows[kind, seed] for seed in range(seeds)]))


def of_digits(seed: int) -> dict[str, float]:
    """Accuracy of what every criterion leaves at every ratio, in every state."""
    train, test = Digits.split(seed)
    program = captured(trained(train, seed))
    calibration, coupling = train.calibration(), gp.analyze(program)
    groups = [group for group in coupling.groups if "convs.0.weight" not in group.weights()]
    context = ScoringContext(program, coupling, groups, calibration, seed=seed)
    noise, gamma = WhiteNoise().scores(context), criterion("scop-gamma").scores(context)
    scored = scores_of(context, ("taylor", "gate-batch", "l2", "random"))
    scored["scop, white noise"] = {name: gamma[name] * each for name, each in noise.items()}
    found = {"whole": accuracy(program, test)}
    for (name, scores), ratio in itertools.product(scored.items(), RATIOS):
        left = without(context, scores, ratio)
        anew = left.with_weights(reestimate(left, calibration))
        states = (left, anew, tuned(anew, train, seed, epochs=EPOCHS))
        for state, smaller in zip(STATES, states, strict=True):
            found[f"{name} | -{ratio:.0%} {state}"] = accuracy(smaller, test)
    return found


def of_text(seed: int) -> dict[str, float]:
    """Held-out loss, in nats per token, without a quarter of the FFN units or of the KV heads."""
    study = Study.of_reference(seed + 1, 16)
    coupling = gp.analyze(study.program)
    found = {"whole": math.log(held_out(study.program))}
    for role in ("ffn", "kv-head"):
        groups = [group for group in coupling.groups if group.role == role]
        context = ScoringContext(study.program, coupling, groups, study.draws[seed], seed=seed)
        for name, scores in scores_of(context, ("taylor", "wanda", "l2", "random")).items():
            found[f"{name} | -25% {role}"] = math.log(held_out(without(context, scores, 0.25)))
    return found


def scores_of(context: ScoringContext, others: Sequence[str]) -> dict[str, Scores]:
    """SCOP with its controls, of one training of the factors, and other criteria."""
    gamma, beta = (criterion(name).scores(context) for name in ("scop-gamma", "scop-beta"))
    scop = {name: gamma[name] * each for name, each in beta.items()}
    ours = {"scop": scop, "scop-gamma": gamma, "scop-beta": beta}
    ours["scop, reversed"] = {name: -each for name, each in scop.items()}
    return ours | {name: criterion(name).scores(context) for name in others}


def without(context: ScoringContext, scores: Scores, ratio: float) -> gp.Program:
    """Return the program without the same part of every group."""
    chosen = [
        (group, lowest_units(scores[group.name], int(group.size * ratio)))
        for group in context.groups
    ]
    step = Step(context.program.fingerprint(), tuple(group.cut(units) for group, units in chosen))
    return gp.apply(context.program, Plan((step,)))


def table(rows: list[dict[str, float]]) -> str:
    """Mean and standard deviation over the seeds."""
    digits = 1 if rows[0]["whole"] > 10 else 3  # per cent, or nats

    def cell(key: str) -> str:
        values = [row[key] for row in rows]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    keys = [key.split(" | ") for key in rows[0] if " | " in key]
    names, columns = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    lines = [
        f"| whole {cell('whole')} | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {n} | {' | '.join(cell(f'{n} | {c}') for c in columns)} |" for n in names]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
