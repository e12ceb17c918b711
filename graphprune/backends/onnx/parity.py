"""Parity: an ONNX model must give what its program gives, on sizes that were never traced.

A decoder is run on prompts, on tokens fed from ONNX Runtime's own caches, on rows padded on either
side, on a chunk that meets a filled cache, and on its own choices of tokens; anything else on
batches of three and one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.onnx.session import (
    CPU,
    Pair,
    open_session,
    positions,
    sizes_for,
)
from graphprune.errors import ParityError
from graphprune.ir.aten import random_nodes
from graphprune.ir.compare import tolerance_of
from graphprune.ir.program import PAST, PRESENT, Program, caches_of
from graphprune.ir.provenance import whereabouts
from graphprune.ir.sample_inputs import random_inputs

SHARED = "past and present in one buffer"
"""The check that lets a runtime keep each cache in one place."""

REFUSED = "refused: rows that are padded on the left come out as NaN"


@dataclass(frozen=True)
class Protocol:
    """How far a decoder is run: prompts, steps, and what else.

    Parameters
    ----------
    prompts
        Batch and length of each prompt; of rows padded on a side, the largest.
    steps
        Tokens decoded after the largest prompt, each side fed from its own caches.
    greedy
        Tokens that each side chooses after a prompt of five; 0 for none.
    whole
        Whether padding, and a chunk that meets a filled cache, are tried for every model; else only
        where attention counts a mask's ones.
    """

    prompts: tuple[tuple[int, int], ...]
    steps: int
    greedy: int = 0
    whole: bool = False


QUICK = Protocol(prompts=((3, 7), (1, 1)), steps=10)
FULL = Protocol(
    prompts=tuple((batch, length) for batch in (1, 3) for length in (1, 3, 17)),
    steps=8,
    greedy=16,
    whole=True,
)


@dataclass(frozen=True)
class Parity:
    """The differences between a model and its program when both are run.

    Parameters
    ----------
    max_relative_error
        The largest difference over the largest absolute value of the output concerned; None when
        the model was not run.
    version
        The version of ONNX Runtime, if it is installed.
    notes
        What was not compared, and why.
    errors
        The largest relative error of each check.
    provider
        The execution provider that ran it.
    """

    max_relative_error: float | None
    version: str | None
    notes: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    provider: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return dataclasses.asdict(self)


def compare(
    program: Program,
    path: Path,
    names: Mapping[str, str],
    *,
    counts: bool = False,
    protocol: Protocol = QUICK,
    provider: str = CPU,
    quantized: bool = False,
    static: bool = False,
) -> Parity:
    """Run the ONNX model at `path` and `program` on the same random inputs.

    Parameters
    ----------
    program
        The program that was exported.
    path
        The ONNX model.
    names
        The name of every dynamic size, by its symbol.
    counts
        Whether the model counts a mask's ones, in place of looking where they are: rows that are
        padded on the left are to come out as NaN then, and others as each row alone.
    protocol
        How much a decoder is run.
    provider
        The execution provider.
    quantized
        Whether the model has quantized weights, whose values `program` has too; activations are
        taken as they are, whatever the model lets be done to them.
    static
        Whether caches keep their length, and a mask tells how much of them is held.

    Raises
    ------
    BackendError
        When ONNX Runtime cannot load the model, or does not run it on `provider`.
    ParityError
        When it fails, or its outputs differ by more than the tolerance of their type (1e-4 for
        float32), naming the check.
    """
    try:
        import onnxruntime
    except ImportError:
        note = "ONNX Runtime is not installed, so the model was checked but not run"
        return Parity(None, None, (note,))
    version = str(onnxruntime.__version__)
    values = (*program.inputs, *program.outputs)
    if provider == CPU and any(value.dtype == torch.bfloat16 for value in values):
        return Parity(None, version, ("not run: bfloat16 has no kernels on the CPU",))
    if drawing := random_nodes(program.graph):
        note = f"not compared: {whereabouts(drawing[0])} draws at random"
        return Parity(None, version, (note,))
    session = open_session(path, provider, whole_activations=quantized)
    pair = Pair(program, session, static=static)
    notes: tuple[str, ...] = ()
    pasts, presents = (
        {value.name.removeprefix(prefix) for value in values if value.name.startswith(prefix)}
        for prefix, values in ((PAST, program.inputs), (PRESENT, program.outputs))
    )
    grows = bool(pasts) and pasts == presents  # caches of what is encoded only go in
    if grows and {"sequence", "past_sequence"} <= set(names.values()):
        notes = _DecoderParity(pair, names, protocol, counts).compare()
    else:
        for batch in (3, 1):
            sizes = sizes_for(program, names, batch)
            rows = next((sizes[s] for s, name in names.items() if name == "batch"), batch)
            pair.check = f"batch of {rows}"
            pair.run(random_inputs(program, sizes, complete=True))
    worst = max(pair.errors.values(), default=0.0)
    return Parity(worst, version, notes, pair.errors, provider)


class _DecoderParity:
    """Runs a decoder and its model through a protocol."""

    def __init__(
        self, pair: Pair, names: Mapping[str, str], protocol: Protocol, counts: bool
    ) -> None:
        self.pair = pair
        self.program = pair.program
        self.names = names
        self.protocol = protocol
        self.counts = counts
        self.logits = self.program.outputs[0].name
        longest = max(length for _, length in protocol.prompts)
        self.room = positions(self.program, names, longest + protocol.steps)
        self.length = min(longest, self.room - 3)
        """Of prompts that are padded, or that a chunk of three follows."""
        self.notes: list[str] = []

    def compare(self) -> tuple[str, ...]:
        """Run every check; returns what was left out."""
        self._prompts()
        padded = [value.name for value in self.program.inputs if not value.name.startswith(PAST)]
        if self.counts or self.protocol.whole:
            if self.length < 3 or padded != ["input_ids", "attention_mask"]:
                self.notes.append("not run on padded prompts")
            else:
                self._padded("right")
                if self.protocol.whole:
                    self._padded("left")
                if self.protocol.whole and (self.counts or self.pair.static):
                    self._shared()
                self._chunk()
        if self.protocol.greedy:
            self._greedy()
        return tuple(self.notes)

    def _prompts(self) -> None:
        largest = max(self.protocol.prompts)
        for batch, length in self.protocol.prompts:
            length = min(length, self.room)
            self.pair.check = f"prompt of {batch} x {length}"
            ours, theirs = self.pair.run(self._sample(batch, length, 0))
            if (batch, length) != (largest[0], min(largest[1], self.room)):
                continue
            steps = min(self.protocol.steps, self.room - length)
            if steps < self.protocol.steps:
                self.notes.append(
                    f"{steps} decode steps: the model has {self.room} positions to try"
                )
            self.pair.check = f"{steps} tokens after it"
            for step in range(steps):
                inputs = self._sample(batch, 1, length + step)
                ours, theirs = self.pair.run({**inputs, **caches_of(ours)}, caches_of(theirs))

    def _padded(self, side: str) -> None:
        """Rows of several lengths: where attention counts ones, each is what it is alone."""
        held = (self.length // 2, self.length, 1)
        inputs = self._sample(len(held), self.length, 0)
        mask = torch.arange(self.length)[None] < torch.tensor(held)[:, None]
        mask = mask.flip(1) if side == "left" else mask
        inputs["attention_mask"] = mask.to(inputs["attention_mask"].dtype)
        self.pair.check = f"padded on the {side}"
        if not self.counts:
            self._rows_together(inputs, mask)
        elif side == "right":
            self._rows_alone(inputs, mask, held)
        else:
            self._rows_refused(inputs)

    def _rows_refused(self, inputs: dict[str, Tensor]) -> None:
        """Check that rows padded on the left come out as NaN: counting ones cannot place them."""
        theirs = self.pair.theirs(inputs)[self.logits]
        ours = self.pair.ours(inputs)[self.logits]
        self.pair.compare(self.logits, ours[1:2], theirs[1:2])
        if not theirs[[0, 2]].isnan().all():
            raise ParityError("rows that are padded on the left give numbers, and wrong ones")
        self.notes.append(REFUSED)

    def _shared(self) -> None:
        """Run a token of each row with past and present in one buffer longer than needed."""
        ours = self.pair.ours(self._sample(2, self.length, 0))
        inputs = self._sample(2, 1, self.length)
        caches = {name: tensor for name, tensor in ours.items() if name.startswith(PRESENT)}
        self.pair.check = SHARED
        try:
            found = self.pair.in_place(inputs, caches, self.length + 9)
            reference = self.pair.ours({**inputs, **caches_of(ours)})
            for name, tensor in reference.items():
                self.pair.compare(name, tensor, found[name])
        except ParityError as error:
            self.pair.errors.pop(SHARED, None)
            self.notes.append(f"past and present need buffers of their own: {error}")

    def _rows_together(self, inputs: dict[str, Tensor], mask: Tensor) -> None:
        """Both sides on the same rows, and two tokens more; what is at padding does not count."""
        ours, theirs = self.pair.ours(inputs), self.pair.theirs(inputs)
        found = [side[self.logits] for side in (ours, theirs)]
        real = mask if found[0].shape[1] == mask.shape[1] else slice(None)
        self.pair.compare(self.logits, *(each[real] for each in found))
        rows, length = mask.shape
        for step in range(2):
            inputs = self._sample(rows, 1, length + step)
            inputs["attention_mask"][:, :length] = mask
            ours = self.pair.ours({**inputs, **caches_of(ours)})
            theirs = self.pair.theirs({**inputs, **caches_of(theirs)})
            self.pair.compare(self.logits, ours[self.logits], theirs[self.logits])

    def _rows_alone(self, inputs: dict[str, Tensor], mask: Tensor, held: tuple[int, ...]) -> None:
        """Run the model on all rows, the program on each, and two tokens more."""
        pair, logits = self.pair, self.logits
        theirs = pair.theirs(inputs)
        alone = []
        for row, size in enumerate(held):
            ids = inputs["input_ids"][row : row + 1, :size]
            alone.append(pair.ours({**self._sample(1, size, 0), "input_ids": ids}))
            pair.compare(logits, alone[row][logits], theirs[logits][row : row + 1, :size])
        length = mask.shape[1]
        for step in range(2):
            inputs = {**self._sample(len(held), 1, length + step), **caches_of(theirs)}
            inputs["attention_mask"][:, :length] = mask
            theirs = pair.theirs(inputs)
            for row, size in enumerate(held):
                one = self._sample(1, 1, size + step)
                one["input_ids"] = inputs["input_ids"][row : row + 1]
                alone[row] = pair.ours({**one, **caches_of(alone[row])})
                pair.compare(logits, alone[row][logits], theirs[logits][row : row + 1])

    def _chunk(self) -> None:
        """Three tokens at once on a filled cache, of one row where attention takes no more."""
        rows = 1 if self.counts else 3
        self.pair.check = "chunk on a filled cache"
        ours, theirs = self.pair.run(self._sample(rows, self.length, 0))
        inputs = self._sample(rows, 3, self.length)
        self.pair.run({**inputs, **caches_of(ours)}, caches_of(theirs))

    def _greedy(self) -> None:
        """Tokens that each side chooses on its own."""
        length = min(5, self.room)
        count = min(self.protocol.greedy, positions(self.program, self.names, 512) - length)
        if self.program.outputs[0].dtype.is_floating_point and count > 0:
            self.pair.check = f"{count} tokens by choice"
            self._choose(self._sample(1, length, 0), length, count)

    def _choose(self, prompt: dict[str, Tensor], length: int, count: int) -> None:
        ours, theirs = self.pair.run(prompt)
        for step in range(count):
            last = [side[self.logits][:, -1] for side in (ours, theirs)]
            chosen = [each.argmax(-1, keepdim=True) for each in last]
            if not torch.equal(*chosen):
                best = last[0].topk(2).values[0]
                gap = float(best[0] - best[1]) / float(last[0].abs().max())
                if gap > 2 * tolerance_of(last[0].dtype):
                    raise ParityError(
                        f"ONNX Runtime chooses token {int(chosen[1])} and the program "
                        f"{int(chosen[0])} ({self.pair.check}, step {step + 1})"
                    )
                self.notes.append(f"tokens by choice end at a tie, after {step} of {count}")
                return
            inputs = {**self._sample(1, 1, length + step), "input_ids": chosen[0]}
            ours, theirs = self.pair.run({**inputs, **caches_of(ours)}, caches_of(theirs))

    def _sample(self, batch: int, new: int, past: int) -> dict[str, Tensor]:
        sizes = {"batch": batch, "sequence": new, "past_sequence": past}
        sizes["total_sequence"] = past + new
        chosen = {symbol: sizes[name] for symbol, name in self.names.items()}
        return random_inputs(self.program, chosen, seed=past, complete=True)
