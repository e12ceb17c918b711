"""What it takes to run a real model on data: memory and time of criteria and of an evaluation.

    python tools/bench_engine.py DIR TEXT [WORK ...] [--samples 16] [--length 256]

Every row is measured in a process of its own: the most anonymous memory (mapped files do not
count) and the processor time of the work alone, beside the same of the plain forward passes by
transformers, in batches of one. DIR is a checkpoint of a language model; WORK is the name of a
criterion, ``evaluate`` or ``plain``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORKS = ("plain", "evaluate", "taylor", "taylor-second", "gate", "wanda", "obs")


def anonymous() -> int:
    """Return the bytes of anonymous memory that this process has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not say what memory is anonymous")


class Peak:
    """The most anonymous memory while it is entered, looked at twenty times a second."""

    def __enter__(self) -> Peak:
        self.bytes, self.ended = anonymous(), threading.Event()
        self.started = os.times()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        now = os.times()
        self.seconds = now.user + now.system - self.started.user - self.started.system


def measure(work: str, directory: str, text: str, samples: int, length: int) -> dict[str, Any]:
    """Do one work, and return what it took."""
    import torch

    from graphprune.calibration.data import Calibration

    data = Calibration.from_text(text, directory, samples=samples, length=length)
    ids = torch.cat([batch["input_ids"] for batch in data])
    if work == "plain":
        return _plain(directory, ids)
    import graphprune as gp
    from graphprune.calibration.layerwise import logits_of_all
    from graphprune.calibration.losses import next_token_loss
    from graphprune.calibration.tokens import token_batch
    from graphprune.criteria import ScoringContext, criterion
    from graphprune.selection.targets import target_groups

    program = gp.load(directory, dtype="auto")
    coupling = gp.analyze(program)
    with Peak() as peak:
        if work == "evaluate":
            batches = [token_batch(row[None]) for row in ids]
            with torch.no_grad():
                every = logits_of_all(program, batches, "logits")
                losses = [next_token_loss(*each) for each in zip(every, batches, strict=True)]
            found = float(torch.stack(losses).mean())
        else:
            groups = target_groups(coupling, "ffn")
            context = ScoringContext(program, coupling, groups, data)
            found = sum(float(each.sum()) for each in criterion(work).scores(context).values())
    return {"result": found, "seconds": peak.seconds, "bytes": peak.bytes}


def _plain(directory: str, ids: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with Peak() as peak, torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    return {"result": sum(losses) / len(losses), "seconds": peak.seconds, "bytes": peak.bytes}


def main() -> None:
    """Measure the works that are asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("text")
    parser.add_argument("works", nargs="*", default=WORKS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        asked = given.directory, given.text, given.samples, given.length
        print(json.dumps(measure(given.works[0], *asked)))
        return
    print("| work | processor seconds | most anonymous memory, GB | result |")
    print("|---|---|---|---|")
    for work in given.works:
        call = [sys.executable, __file__, given.directory, given.text, work, "--here"]
        call += ["--samples", str(given.samples), "--length", str(given.length)]
        began = time.monotonic()
        ran = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(ran.stdout.splitlines()[-1])
        print(
            f"| {work} | {row['seconds']:.1f} | {row['bytes'] / 1e9:.2f} | {row['result']:.5g} |",
            flush=True,
        )
        print(f"{work}: {time.monotonic() - began:.0f} s with loading", file=sys.stderr)


if __name__ == "__main__":
    main()
