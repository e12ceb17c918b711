"""Statistics of activations, taken where a weight is multiplied with them, over calibration data.

One walk over the graph serves any number of matrices and kinds of statistics. All batches move
through the graph together, one segment (the nodes of one numbered layer) after the other, so that
what is changed in a layer is seen by the next one; only what is still needed is held.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphprune.calibration import Calibration
from graphprune.contractions import Matrix, Use
from graphprune.errors import CalibrationError
from graphprune.output import staged_file
from graphprune.program import Program, layer_of, module_path
from graphprune.progress import Track, silent

Kind = Literal["moments", "gram"]
"""Sums and sums of squares of each input, or all products of two inputs as well."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What is known of the inputs of a matrix, from `count` rows (tokens, or windows of an image).

    Parameters
    ----------
    count
        ``[parts]``: rows that each part saw. An expert sees only the tokens routed to it.
    total, squares
        ``[parts, in]``: sums of the inputs and of their squares, float64.
    gram
        ``[parts, in, in]``: the sum of x xᵀ, float64; or None where it was not asked for.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    gram: Tensor | None = None

    @classmethod
    def empty(cls, matrix: Matrix, kind: Kind) -> InputStatistics:
        """Nothing seen yet."""
        parts, _, size = matrix.shape
        wide = torch.float64
        return cls(
            torch.zeros(parts, dtype=torch.int64),
            torch.zeros(parts, size, dtype=wide),
            torch.zeros(parts, size, dtype=wide),
            torch.zeros(parts, size, size, dtype=wide) if kind == "gram" else None,
        )

    @property
    def mean(self) -> Tensor:
        """``[parts, in]``; zero where a part saw nothing."""
        return self.total / self.count.clamp(min=1)[:, None]

    @property
    def variance(self) -> Tensor:
        """``[parts, in]``, over the rows (not corrected); zero where a part saw nothing."""
        square = self.squares / self.count.clamp(min=1)[:, None]
        return (square - self.mean.square()).clamp(min=0)

    @property
    def norm(self) -> Tensor:
        """``[parts, in]``: the L2 norm of each input over all rows."""
        return self.squares.sqrt()

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        held = (self.count, self.total, self.squares, self.gram)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def add(self, part: int, rows: Tensor) -> None:
        """Count ``[n, in]`` more rows of `part` in."""
        wide = rows.double()
        self.count[part] += len(rows)
        self.total[part] += wide.sum(0)
        self.squares[part] += wide.square().sum(0)
        if self.gram is not None:
            self.gram[part].addmm_(wide.mT, wide)


Statistics = dict[str, InputStatistics]
"""The name of a matrix -> the statistics of its inputs."""

Edit = Callable[[Sequence[fx.Node], Sequence[Matrix], Statistics], Mapping[str, Tensor]]
"""Given the nodes of a segment, its matrices and their statistics: new weights by name."""


@dataclass(frozen=True)
class Walk:
    """What a walk left.

    Parameters
    ----------
    weights
        The weights that were changed, by name.
    statistics
        Those of every matrix; empty where they were used up on the way.
    peak_bytes
        The most that activations and statistics took together.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics
    peak_bytes: int


def observe(
    program: Program,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    kind: Kind = "moments",
    track: Track = silent,
) -> Statistics:
    """Statistics of the inputs of `matrices`, on the program as it is.

    Parameters
    ----------
    program
        The program.
    matrices
        From `graphprune.contractions.contractions`.
    calibration
        Batches to run it on. Padding is cut off first, so no padded token is counted.
    kind
        "moments", or "gram" for the products of all pairs of inputs too (memory: 8 in² bytes each).
    track
        Wraps the loop over segments in a progress bar.

    Returns
    -------
    dict
        `InputStatistics` by the name of the matrix.

    Raises
    ------
    CalibrationError
        When the batches do not fit the program, or a statistic is not finite.
    """
    return walk(program, matrices, calibration, kind, None, track).statistics


def walk(
    program: Program,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    kind: Kind = "moments",
    edit: Edit | None = None,
    track: Track = silent,
) -> Walk:
    """Walk all batches through the graph, segment by segment.

    With `edit`, a segment is run to take its statistics, its weights are edited, and it is run
    again with the new ones, so that later segments see what the edit did (the order of Wanda,
    Sun et al. 2306.11695, section 3, and of SparseGPT). Without, one run of each suffices.

    Raises
    ------
    CalibrationError
        When the batches do not fit the program, or a statistic is not finite.
    """
    calibration.check(program)
    last = {used: node for node in program.graph.nodes for used in node.all_input_nodes}
    runs = [_Run(program, batch, last) for batch in unpadded(calibration)]
    by_node: dict[fx.Node, list[tuple[Matrix, Use]]] = {}
    for matrix in matrices:
        for use in matrix.uses:
            by_node.setdefault(use.node, []).append((matrix, use))
    changed: dict[str, Tensor] = {}
    statistics: Statistics = {}
    peak = 0
    for nodes in track(segments(program, matrices), "walking the graph"):
        here = {m.name: m for node in nodes for m, _ in by_node.get(node, ())}
        found = {name: InputStatistics.empty(m, kind) for name, m in here.items()}
        again = edit is not None and bool(here)
        for run in runs:
            held = run.copied(nodes) if again else run.values
            for node in nodes:
                for matrix, use in by_node.get(node, ()):
                    for part, rows in use.rows(held):
                        found[matrix.name].add(part, rows)
                run.step(node, held)
        _check_finite(found)
        statistics_bytes = sum(each.bytes for each in (*statistics.values(), *found.values()))
        peak = max(peak, sum(run.bytes for run in runs) + statistics_bytes)
        if edit is None:
            statistics |= found
        elif again:
            new = edit(nodes, list(here.values()), found)
            changed |= new
            for run in runs:
                run.replace(new)
                for node in nodes:
                    run.step(node, run.values)
        for run in runs:
            run.forget(nodes)
    return Walk(changed, statistics, peak)


def _check_finite(statistics: Statistics) -> None:
    for name, each in statistics.items():
        if not bool(torch.isfinite(each.squares).all()):
            raise CalibrationError(f"{name}: its inputs on the calibration data are not finite")


class _Run:
    """One batch on its way through the graph; `last` is the last user of every node."""

    def __init__(
        self, program: Program, batch: Mapping[str, Tensor], last: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.interpreter = fx.Interpreter(program.graph_module, garbage_collect_values=False)
        self.nodes = dict(program.weight_nodes())
        self.values: dict[fx.Node, Any] = {
            node: program.weights[name].detach() for name, node in program.weight_nodes()
        }
        filled = program.fill(batch)
        self.values |= {node: filled[value.name] for value, node in program.input_nodes()}
        self.last = last

    @torch.no_grad()
    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op not in ("placeholder", "output"):
            self.interpreter.env = values
            values[node] = self.interpreter.run_node(node)

    def copied(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """Values for a trial run; copies, where an operator of `nodes` writes into its input."""
        if not any(_writes(node) for node in nodes):
            return dict(self.values)
        held = set(self.nodes.values())
        return {
            node: value if node in held or not isinstance(value, Tensor) else value.clone()
            for node, value in self.values.items()
        }

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.values[self.nodes[name]] = weight

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop what no node after `nodes` needs."""
        for node in nodes:
            for used in (*node.all_input_nodes, node):
                if self.last.get(used, node) is node:
                    self.values.pop(used, None)

    @property
    def bytes(self) -> int:
        """Memory of its activations."""
        weights = set(self.nodes.values())
        return sum(
            value.nbytes
            for node, value in self.values.items()
            if node not in weights and isinstance(value, Tensor)
        )


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _layer(node: fx.Node) -> str:
    """The path of the numbered layer that `node` belongs to, or ""."""
    return layer_of(module_path(node)) if node.op != "placeholder" else ""


def segments(program: Program, matrices: Sequence[Matrix] = ()) -> list[list[fx.Node]]:
    """The graph's nodes in order, one list for each numbered layer and for what lies between them.

    Nodes of no layer amid those of one go with it. A weight in `matrices` that is used in several
    segments makes them one, with all between.
    """
    layers = [_layer(node) for node in program.graph.nodes]
    last = {layer: at for at, layer in enumerate(layers)}
    first = {layer: layers.index(layer) for layer in last}
    nodes: list[list[fx.Node]] = []
    names: list[str] = []
    for at, (node, layer) in enumerate(zip(program.graph.nodes, layers, strict=True)):
        amid = bool(names and names[-1]) and first[names[-1]] <= at <= last[names[-1]]
        name = names[-1] if not layer and amid else layer
        if not names or name != names[-1]:
            names.append(name)
            nodes.append([])
        nodes[-1].append(node)
    where = {node: at for at, part in enumerate(nodes) for node in part}
    reach = list(range(len(nodes)))
    for weight in {matrix.weight for matrix in matrices}:
        places = [where[u.node] for m in matrices if m.weight == weight for u in m.uses]
        reach[min(places)] = max(reach[min(places)], *places)
    merged: list[list[fx.Node]] = []
    end = -1
    for at, part in enumerate(nodes):
        if at > end:
            merged.append([])
        merged[-1].extend(part)
        end = max(end, reach[at])
    return merged


def unpadded(calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """The batches without padding: rows of one length together, cut to their tokens.

    Raises
    ------
    CalibrationError
        When a mask is zero between two tokens, or everywhere.
    """
    for index, batch in enumerate(calibration):
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if mask is None or ids is None or mask.shape != ids.shape or bool(mask.all()):
            yield batch
            continue
        kept = mask.bool()
        counts = kept.sum(1)
        first = kept.int().argmax(1)
        whole = [
            bool(row[start : start + count].all())
            for row, start, count in zip(kept, first.tolist(), counts.tolist(), strict=True)
        ]
        if not bool((counts > 0).all()) or not all(whole):
            raise CalibrationError(
                f"calibration batch {index}: padding must be at the ends of a row that has tokens"
            )
        for start, count in sorted(set(zip(first.tolist(), counts.tolist(), strict=True))):
            rows = (first == start) & (counts == count)
            yield {
                name: tensor[rows][:, start : start + count]
                if tensor.shape[:2] == mask.shape
                else tensor[rows]
                for name, tensor in batch.items()
            }


def damped(gram: Tensor, damp: float) -> Tensor:
    """`gram`, ``[in, in]``, with `damp` times the mean of its diagonal added to the diagonal."""
    mean = gram.diagonal().mean().clamp(min=1e-30)
    return gram + torch.eye(len(gram), dtype=gram.dtype) * damp * mean


# -- keeping them ----------------------------------------------------------------------------------


def save_statistics(statistics: Statistics, path: str | PathLike[str], program: Program) -> None:
    """Write statistics as a safetensors file, with the fingerprint of the program they are of."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}:{key}": value
        for name, each in statistics.items()
        for key, value in vars(each).items()
        if value is not None
    }
    metadata = {"format": "1", "fingerprint": program.fingerprint()}
    with staged_file(Path(path)) as staged:
        save_file(tensors, str(staged), {"graphprune": json.dumps(metadata)})


def load_statistics(path: str | PathLike[str], program: Program) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises
    ------
    CalibrationError
        When the file is no such file, or is of another program.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(path), "pt") as file:
            metadata = json.loads((file.metadata() or {})["graphprune"])
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name, _, part = key.rpartition(":")
                found.setdefault(name, {})[part] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CalibrationError(f"{path} holds no statistics: {error}") from error
    if metadata.get("fingerprint") != program.fingerprint():
        raise CalibrationError(f"{path} holds the statistics of another program")
    return {name: InputStatistics(**parts) for name, parts in found.items()}
