"""The statistics of batch norms, taken anew on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import BatchExecution
from graphprune.errors import CalibrationError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import ancestors
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program

BATCH_NORM = torch.ops.aten.batch_norm.default


def reestimate(
    program: Program, calibration: Calibration, track: Progress = no_progress
) -> dict[str, Tensor]:
    """Return the means and variances of every batch norm, as they are on the calibration data.

    All batches move through the graph together, so that each batch norm sees what those before it
    make of the data with their new statistics. The variance is the unbiased one, which is what
    PyTorch keeps.

    Parameters
    ----------
    program
        The program, whose batch norms use what they keep.
    calibration
        The data.
    track
        Wraps the loop over the graph in a progress bar.

    Returns
    -------
    dict
        The new buffers by name, ``[channels]`` each; empty where no batch norm keeps statistics.

    Raises
    ------
    CalibrationError
        When the data does not fit the program, gives a channel fewer than two values or values
        that are not finite, or two batch norms keep their statistics together.
    """
    calibration.check(program)
    norms = dict(_kept(program))
    if not norms:
        return {}
    needed = ancestors(list(norms))
    batches = list(calibration)
    own = [batches[at] for at in own_batches(batches)]
    nodes = [n for n in program.graph.nodes if n in needed and n.op != "placeholder"]
    executions = BatchExecution.of_all(program, own, [[node] for node in nodes])
    found: dict[str, Tensor] = {}
    for node in track(nodes, "taking statistics of batch norms"):
        if node in norms:
            mean, variance = norms[node]
            if mean in found or variance in found:
                raise CalibrationError(f"{mean}: two batch norms keep it together")
            source = arguments_of(node)["input"]
            moments = _moments(program, mean, [each.values[source] for each in executions])
            for name, moment in zip((mean, variance), moments, strict=True):
                found[name] = moment.to(program.weights[name].dtype)
        for execution in executions:
            execution.replace({name: found[name] for name in norms.get(node, ())})
            execution.advance([node])
    return found


def _kept(program: Program) -> Iterator[tuple[fx.Node, tuple[str, str]]]:
    """Yield every batch norm that keeps statistics, with the names of its mean and variance."""
    names = {node: name for name, node in program.weight_nodes()}
    for node in program.graph.find_nodes(op="call_function", target=BATCH_NORM):
        args = arguments_of(node)
        if args["running_mean"] in names and args["running_var"] in names:
            yield node, (names[args["running_mean"]], names[args["running_var"]])


def _moments(program: Program, name: str, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the moments of ``[batch, channels, ...]`` together for the batch norm of mean `name`.

    They are the mean and the unbiased variance, ``[channels]``.
    """
    rows = [value.double().movedim(1, -1).flatten(0, -2) for value in values]
    channels = program.weights[name].numel()
    start = torch.zeros(channels, dtype=torch.float64, device=program.device)
    count = torch.tensor([sum(map(len, rows))], dtype=start.dtype, device=program.device)
    total = sum((each.sum(0) for each in rows), start)
    ranks.sum_of([total, count])
    if count < 2:
        raise CalibrationError(
            f"{name}: the data has {int(count)} value of each channel; 2 are needed"
        )
    mean = total / count
    square = sum(((each - mean).square().sum(0) for each in rows), start)
    ranks.sum_of([square])
    if not bool(torch.isfinite(square).all()):
        raise CalibrationError(f"{name}: its inputs on the calibration data are not finite")
    return mean, square / (count - 1)
