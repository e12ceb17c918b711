"""Perplexity of the packaged checkpoint after setting weights to zero, by criterion and pattern.

    python tools/bench_sparsify.py          # three draws of calibration text; a Markdown table

Nothing is trained afterwards. The text is held out: neither trained on nor calibrated with.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import typer
from heldout import Study, held_out
from rich.console import Console
from rich.progress import track

PATTERNS = ("0.3", "0.5", "0.6", "4:8", "2:4")
CRITERIA = ("sparsegpt", "wanda", "wanda-variant", "magnitude", "random")


def main(
    seeds: Annotated[int, typer.Option(help="How many draws of calibration text.")] = 3,
    samples: Annotated[int, typer.Option(help="Windows of 128 tokens in each.")] = 32,
) -> None:
    """Sparsify by every criterion and pattern, and print the table."""
    study = Study.of_reference(seeds, samples)

    def measured(criterion: str, pattern: str) -> str:
        if criterion == "wanda-variant" and ":" in pattern:
            return ""
        once = criterion == "magnitude"
        text = f"sparsify{{pattern={pattern} criterion={criterion}}}"
        found = study.after(text, draws=1 if once else None)
        spread = "" if once else f" ± {statistics.stdev(found):.2f}"
        return f"{statistics.mean(found):.2f}{spread}"

    dense = held_out(study.program)
    lines = [f"| dense {dense:.2f} | {' | '.join(PATTERNS)} |", "|---" * (len(PATTERNS) + 1) + "|"]
    for criterion in track(CRITERIA, console=Console(stderr=True)):
        cells = " | ".join(measured(criterion, pattern) for pattern in PATTERNS)
        lines.append(f"| `{criterion}` | {cells} |")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
