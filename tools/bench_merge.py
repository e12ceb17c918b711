"""Loss of the packaged checkpoint after merging KV heads, by what the new heads are.

    python tools/bench_merge.py          # three draws of calibration text; a Markdown table

Nothing is trained afterwards. The text is held out: neither trained on nor calibrated with. Numbers
are increases of the loss in nats; "of mean" is their part of that of averaging neighbours.
"""

from __future__ import annotations

import math
import statistics
from typing import Annotated

import typer
from heldout import Study, held_out
from rich.console import Console
from rich.progress import track

GROUPS = (4, 2, 1)
INITS = {
    "mean": "init=mean",
    "mean, by similarity": "init=mean order=similarity",
    "first": "init=first",
    "random": "init=random",
    "aligned": "init=aligned",
    "aligned, neighbours": "init=aligned order=contiguous",
}


def main(
    seeds: Annotated[int, typer.Option(help="How many draws of calibration text.")] = 3,
    samples: Annotated[int, typer.Option(help="Windows of 128 tokens in each.")] = 32,
) -> None:
    """Merge by every init and into so many groups, and print the table."""
    study = Study.of_reference(seeds, samples)
    dense = math.log(held_out(study.program))
    plain: dict[int, float] = {}

    def measured(options: str, groups: int) -> str:
        once = "mean" in options or "first" in options
        text = f"merge-kv-heads{{groups={groups} {options}}}"
        found = [math.log(after) - dense for after in study.after(text, draws=1 if once else None)]
        mean = statistics.mean(found)
        spread = "" if once else f" ± {statistics.stdev(found):.3f}"
        return f"{mean:.3f}{spread} | {mean / plain.setdefault(groups, mean):.3f}"

    lines = [
        f"| dense {dense:.3f} | " + " | ".join(f"into {g} | of mean" for g in GROUPS) + " |",
        "|---" * (2 * len(GROUPS) + 1) + "|",
    ]
    for name, options in track(INITS.items(), console=Console(stderr=True)):
        lines.append(f"| {name} | {' | '.join(measured(options, groups) for groups in GROUPS)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
