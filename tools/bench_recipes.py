"""Loss of the packaged checkpoint after pruning, by recipe: criterion, steps and refitting.

    python tools/bench_recipes.py           # three draws of calibration text; a Markdown table

Units of the FFN and KV heads go together: the same part of each or, in the global recipes, as many
parameters from wherever they are missed least for what they save. Nothing is trained afterwards,
and the text is held out: neither trained on nor calibrated with. LLM-Pruner's plain recipe comes
first.
"""

from __future__ import annotations

import math
import statistics
from typing import Annotated

import typer
from heldout import Study, held_out
from rich.console import Console
from rich.progress import track

import graphprune as gp
from graphprune.cost import Costs
from graphprune.selection import target_groups

RATIOS = (0.25, 0.5)
PRUNE = (
    "prune{{target=ffn ratio={ratio} {options}}},prune{{target=kv-heads ratio={ratio} {options}}}"
)
GLOBAL = "prune{{target=ffn,kv-heads params={params} scope=global {options}}}"
RECIPES = {
    "taylor (LLM-Pruner, element-wise)": PRUNE.replace("{options}", "criterion=taylor"),
    "taylor-second": PRUNE.replace("{options}", "criterion=taylor-second"),
    "l2": PRUNE.replace("{options}", "criterion=l2"),
    "random": PRUNE.replace("{options}", "criterion=random"),
    "wanda": PRUNE.replace("{options}", "criterion=wanda"),
    "taylor, 4 steps": PRUNE.replace("{options}", "criterion=taylor steps=4"),
    "taylor, reconstruct": PRUNE.replace("{options}", "criterion=taylor") + ",reconstruct",
    "l2, reconstruct": PRUNE.replace("{options}", "criterion=l2") + ",reconstruct",
    "random, reconstruct": PRUNE.replace("{options}", "criterion=random") + ",reconstruct",
    "obs, reconstruct": PRUNE.replace("{options}", "criterion=obs") + ",reconstruct",
    "taylor, global": GLOBAL.replace("{options}", "criterion=taylor"),
    "taylor, global by loss": GLOBAL.replace("{options}", "criterion=taylor normalise=loss"),
    "taylor, global by loss, reconstruct": GLOBAL.replace(
        "{options}", "criterion=taylor normalise=loss"
    )
    + ",reconstruct",
    "obs, global by loss, reconstruct": GLOBAL.replace("{options}", "criterion=obs normalise=loss")
    + ",reconstruct",
}


def main(
    seeds: Annotated[int, typer.Option(help="How many draws of calibration text.")] = 3,
    samples: Annotated[int, typer.Option(help="Windows of 128 tokens in each.")] = 32,
) -> None:
    """Prune by every recipe and ratio, and print the table."""
    study = Study.of_reference(seeds, samples)
    dense = math.log(held_out(study.program))
    shares = {ratio: parameters_gone(study.program, ratio) for ratio in RATIOS}
    plain: dict[float, float] = {}

    def measured(recipe: str, ratio: float) -> str:
        pipeline = recipe.format(ratio=ratio, params=shares[ratio])
        found = [math.log(after) - dense for after in study.after(pipeline)]
        mean = statistics.mean(found)
        share = mean / plain.setdefault(ratio, mean)
        return f"{mean:.3f} ± {statistics.stdev(found):.3f} | {share:.2f}"

    lines = [
        f"| dense {dense:.3f} | " + " | ".join(f"-{r:.0%} | of plain" for r in RATIOS) + " |",
        "|---" * (2 * len(RATIOS) + 1) + "|",
    ]
    for name, recipe in track(RECIPES.items(), console=Console(stderr=True)):
        lines.append(f"| {name} | {' | '.join(measured(recipe, ratio) for ratio in RATIOS)} |")
    print("\n".join(lines))


def parameters_gone(program: gp.Program, ratio: float) -> float:
    """The part of the parameters that the same ratio of all FFN units and KV heads holds."""
    coupling = gp.analyze(program)
    groups = [g for target in ("ffn", "kv-heads") for g in target_groups(coupling, target)]
    costs = Costs(coupling)
    left = costs.after("params", {group.name: int(group.size * ratio) for group in groups})
    return 1 - left / costs.after("params", {})


if __name__ == "__main__":
    typer.run(main)
