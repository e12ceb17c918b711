"""Prompts and single tokens on the CPU: dense, pruned and merged models, by our and others' export.

    python tools/bench_onnx.py --genai PYTHON            # all sections; goes on where it stopped
    python tools/bench_onnx.py --genai PYTHON --quick    # a part of them, shortly; only printed
    python tools/bench_onnx.py --report                  # only the tables, of what was measured

PYTHON is the interpreter of an environment with onnxruntime-genai and torch, whose model builder
makes graphs that are run here; without it they are left out. What is compared takes turns within
one process, in another order each time, and ratios are of times in the same turn: the process time
with one thread, which other load moves little, and the wall clock with two. Rows are kept in
``out/bench_onnx.jsonl`` and the tables written to ``tools/ONNX_BENCH.md``.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers as tf
import typer
from onnx_routes import (
    BUILDER,
    BUILDER_PACKAGE,
    COMPILED,
    DENSE,
    EAGER,
    EXPORTER,
    EXPORTER_CPU,
    IN_TORCH,
    ONE_CACHE,
    OURS,
    PLAIN,
    PORTABLE,
    Facts,
    Inputs,
    Runner,
    Sessions,
    Work,
    Workshop,
    genai_version,
    operators,
    ort_runner,
    torch_runner,
)
from onnx_table import Rows, report
from rich.console import Console

from graphprune.errors import first_line

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
TABLES = HERE / "ONNX_BENCH.md"
ROUNDS = 2
"""How often sessions are made anew, each time in reverse order: when they are made counts, too."""
FEWEST, MOST = 2, 30
"""Turns of a round, whatever they take."""
SAME = 1e-3
"""Relative difference of logits up to which two routes compute the same."""

LARGE = tf.LlamaConfig(
    vocab_size=4096,
    hidden_size=1152,  # which 16, 12 and 8 heads divide: LlamaConfig takes no others
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    head_dim=64,
    max_position_embeddings=8192,
)
SMALL = tf.LlamaConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=16,
    max_position_embeddings=8192,
)

Contestant = tuple[str, str]
"""A model and a route."""

_PROMPTS = (Work(0, 64), Work(0, 256), Work(0, 512))
_TOKENS = (Work(64, 1), Work(512, 1), Work(2048, 1), Work(4096, 1))
FEW = (Work(0, 256), Work(64, 1), Work(2048, 1))
"""What is profiled, and measured where it has to be short."""


@dataclass(frozen=True)
class Section:
    """What is compared in turns."""

    config: tf.LlamaConfig
    models: Sequence[str]
    routes: Sequence[str]
    works: Sequence[Work]
    threads: Sequence[int] = (1, 2)

    def contestants(self, work: Work, genai: bool) -> list[Contestant]:
        """Every model on every route that can do `work`: one cache is for decoding."""
        return [
            (model, route)
            for model, route in itertools.product(self.models, self.routes)
            if (genai or not route.startswith(BUILDER))
            and (work.past or not route.endswith(ONE_CACHE))
        ]


_SHARED = (OURS + ONE_CACHE, BUILDER + ONE_CACHE)
SECTIONS = {
    "dense": Section(
        LARGE,
        (DENSE,),
        (OURS, PLAIN, BUILDER, EXPORTER_CPU, EXPORTER, *_SHARED, EAGER, COMPILED),
        _PROMPTS + _TOKENS,
    ),
    "pruned": Section(
        LARGE,
        (DENSE, "-25 %", "-50 %"),
        (OURS, BUILDER, EXPORTER_CPU, *_SHARED, EAGER),
        FEW,
    ),
    "kv": Section(
        LARGE,
        (DENSE, "4 KV heads", "1 KV head"),
        (OURS, PLAIN, BUILDER, EXPORTER_CPU, *_SHARED),
        (Work(0, 256), *_TOKENS),
    ),
    "small": Section(
        SMALL,
        (DENSE, "4 KV heads"),
        (OURS, PORTABLE, PLAIN),
        FEW,
        threads=(1,),
    ),
}
PROFILED = (OURS, PLAIN, BUILDER, EXPORTER_CPU, EXPORTER)


def quickly(name: str) -> Section:
    """Return the part of a section that a few minutes are enough for."""
    section = SECTIONS[name]
    left_out = {PLAIN, EXPORTER, EAGER, COMPILED} | ({EXPORTER_CPU} if name != "dense" else set())
    return dataclasses.replace(
        section,
        models=[model for model in section.models if model not in ("-25 %", "1 KV head")],
        routes=[route for route in section.routes if route not in left_out],
        works=[work for work in section.works if work in FEW],
        threads=(1,),
    )


def main(
    genai: Annotated[Path | None, typer.Option(help="Interpreter that has the builder.")] = None,
    only: Annotated[str, typer.Option(help="Sections, joined by commas; all by default.")] = "",
    only_report: Annotated[bool, typer.Option("--report", help="Only make the tables.")] = False,
    again: Annotated[bool, typer.Option(help="Measure the chosen sections anew.")] = False,
    quick: Annotated[bool, typer.Option(help="A part, kept nowhere; tables are printed.")] = False,
    seconds: Annotated[float, typer.Option(help="For the turns of each kind of work.")] = 15,
) -> None:
    """Measure what is missing, and write the tables."""
    every = [*SECTIONS, "operators"]
    chosen = [] if only_report else only.split(",") if only else every
    if unknown := [name for name in chosen if name not in every]:
        raise typer.BadParameter(f"no section {unknown[0]!r}; there are {', '.join(every)}")
    # The exporters and the compiler tell of what they leave out.
    logging.disable(logging.WARNING)
    console = Console(stderr=True)
    genai = genai and genai.absolute()  # the builder runs in another directory
    if chosen:
        ask_for_huge_pages()
    rows = Rows.read(None if quick else OUT / "bench_onnx.jsonl")
    if chosen and genai is None:
        console.print("no --genai: the model builder of onnxruntime-genai is left out")
    with tempfile.TemporaryDirectory() as folder:
        shops: dict[int, Workshop] = {}
        for name in chosen:
            of = "dense" if name == "operators" else name
            section = quickly(of) if quick else SECTIONS[of]
            config = section.config
            shop = shops.setdefault(id(config), Workshop(config, Path(folder), genai))
            bench = Bench(name, section, shop, rows, again, console)
            if name == "operators":
                bench.profile()
            else:
                bench.compare(3 if quick else seconds)
    tables = report(rows)
    if quick:
        print(tables)
        return
    TABLES.write_text(tables, encoding="utf-8")
    console.print(f"wrote {TABLES}")


def ask_for_huge_pages() -> None:
    """Begin anew with an allocator that asks for huge pages, unless this one does.

    Among small ones, where its weights come to lie makes a session slower than another on the same
    file by up to a tenth.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" not in given:
        asked = ":".join(filter(None, (given, "glibc.malloc.hugetlb=1")))
        environment = {**os.environ, "GLIBC_TUNABLES": asked}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def versions(genai: Path | None) -> dict[str, str]:
    """Of what is measured."""
    names = ("graphprune", "torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu")
    found = {name: version(name) for name in names}
    return found | ({BUILDER_PACKAGE: genai_version(genai)} if genai else {})


@dataclass
class Bench:
    """Measures one section, and keeps what it finds.

    Parameters
    ----------
    name, section
        What is measured.
    shop
        Where its models come from.
    rows
        Where the results go.
    again
        Whether what is there already is measured anew.
    console
        Tells how far it has come.
    """

    name: str
    section: Section
    shop: Workshop
    rows: Rows
    again: bool
    console: Console

    def compare(self, seconds: float) -> None:
        """Time each kind of work, for about so many seconds."""
        for threads in self.section.threads:
            torch.set_num_threads(threads)
            for work in self.section.works:
                if self._missing(threads, work):
                    self._take_turns(threads, work, seconds)
        torch.set_num_threads(1)

    def _take_turns(self, threads: int, work: Work, seconds: float) -> None:
        shop = self.shop
        facts = {
            model: dataclasses.asdict(Facts.of(shop.program(model)))
            for model in self.section.models
        }
        wanted = self.section.contestants(work, shop.genai is not None)
        clock = time.process_time if threads == 1 else time.perf_counter
        compared = Compared()
        in_torch = cache(partial(torch_runner, shop, work))

        def take_turns(contestants: Sequence[Contestant]) -> None:
            sessions = Sessions(threads)

            def make(model: str, route: str) -> Runner:
                if route in IN_TORCH:
                    return in_torch(model, route)
                return ort_runner(shop, sessions, work, model, route)

            ready = compared.prepared(contestants, make)
            compared.add(turns(ready, clock, seconds / ROUNDS))

        for index in range(ROUNDS):
            take_turns(wanted[::-1] if index % 2 else wanted)
        for (model, route), why in compared.refused.items():
            self.console.print(f"{model}, {route}: {why}", style="red")
        times = {each: t for each, t in compared.times.items() if each not in compared.refused}
        count = len(next(iter(times.values())))
        self._keep(
            threads,
            work,
            f"{len(times)} in {count} turns",
            times=[[*each, taken] for each, taken in times.items()],
            refused=[[*each, why] for each, why in compared.refused.items()],
            facts=facts,
        )

    def profile(self) -> None:
        """Count and time the operators of the dense model's graphs."""
        routes = [route for route in PROFILED if route in self.section.routes]
        if self.shop.genai is None:
            routes.remove(BUILDER)
        for work in FEW:
            if not self._missing(1, work):
                continue
            config = tf.AutoConfig.from_pretrained(self.shop.checkpoint(DENSE))
            found = {}
            for route in routes:
                path = self.shop.graph(DENSE, route, work)
                runs = 20 if work.new == 1 else 4
                found[route] = operators(path, Inputs(config, work), self.shop.folder, runs)
            self._keep(1, work, f"{len(found)} profiled", operators=found)

    def _missing(self, threads: int, work: Work) -> bool:
        """Whether a kind of work has to be measured, or had no builder though now there is one."""
        row = self.rows.find(self.name, threads, work)
        had = row is not None and (self.shop.genai is None or BUILDER_PACKAGE in row["versions"])
        return self.again or not had

    def _keep(self, threads: int, work: Work, said: str, **found: Any) -> None:
        key = {"section": self.name, "threads": threads, "past": work.past, "new": work.new}
        self.rows.add({**key, **found, "versions": versions(self.shop.genai)})
        self.console.print(f"{self.name}, {threads} threads, {work}: {said}")


@dataclass
class Compared:
    """What was found for one kind of work, round by round."""

    times: dict[Contestant, list[float]] = field(default_factory=dict)
    refused: dict[Contestant, str] = field(default_factory=dict)
    meant: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Logits of the first route of each model."""

    def prepared(
        self, wanted: Sequence[Contestant], make: Callable[[str, str], Runner]
    ) -> dict[Contestant, Runner]:
        """Return what computes the same as the first route of its model, ready to run."""
        ready = {}
        for model, route in wanted:
            if (model, route) in self.refused:
                continue
            try:
                made = make(model, route)
                made.run()
            except Exception as error:  # noqa: BLE001 - whatever it is, the table has the reason
                self.refused[model, route] = first_line(error, typed=True)
                continue
            found = made.logits().copy()
            made.restore()
            first = self.meant.setdefault(model, found)
            difference = float(np.abs(found - first).max() / np.abs(first).max())
            if difference <= SAME:
                ready[model, route] = made
            else:
                self.refused[model, route] = f"its logits are {difference:.0e} off"
        return ready

    def add(self, times: Mapping[Contestant, Sequence[float]]) -> None:
        """Keep the times of a round."""
        for each, taken in times.items():
            self.times.setdefault(each, []).extend(round(ms, 4) for ms in taken)


def turns(
    ready: dict[Contestant, Runner], clock: Callable[[], float], seconds: float
) -> dict[Contestant, list[float]]:
    """Milliseconds of every run, turn by turn, until `seconds` are over.

    A first turn is not counted: torch.compile compiles again when it sees a size change, and pages
    of weights are touched for the first time.
    """
    times: dict[Contestant, list[float]] = {each: [] for each in ready}
    order, chance = list(ready), random.Random(0)
    for turn in range(MOST + 1):
        chance.shuffle(order)  # who comes after whom counts for some per cent
        for each in order:
            start = clock()
            ready[each].run()
            times[each].append(1e3 * (clock() - start))
            ready[each].restore()
        if turn == 0:
            began = time.monotonic()
        elif turn >= FEWEST and time.monotonic() - began > seconds:
            break
    return {each: taken[1:] for each, taken in times.items()}


if __name__ == "__main__":
    typer.run(main)
