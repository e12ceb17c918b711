"""Times of single kernels in ONNX Runtime, measured once and kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from graphprune.backends.onnx.session import open_session, provider_name
from graphprune.errors import BackendError
from graphprune.io.atomic import as_json, staged_file
from graphprune.selection.cost import Kernel

_SECONDS, _RUNS = 0.02, 5
"""How long a kernel is run, and how often at least; the shortest run counts."""

_OPSET = 18


class KernelTimes:
    """Times of kernels on a provider, each measured when it is first asked for.

    Parameters
    ----------
    provider
        An execution provider of ONNX Runtime, or a short name such as "cuda".
    path
        A file to keep them in: read where it exists, written from `keep` on. None: they are not
        kept.
    threads
        Threads of the CPU provider; by default as many as torch has.

    Raises
    ------
    BackendError
        When ONNX Runtime is not installed or has no such provider here, or the file holds times of
        another one.
    """

    def __init__(
        self, provider: str = "cpu", path: Path | None = None, threads: int | None = None
    ) -> None:
        self.provider, self.path = provider_name(provider), path
        self._threads = threads or torch.get_num_threads()
        self._about = {"provider": self.provider, "threads": self._threads}
        self._times: dict[str, float] = {}
        self._kept = False
        if path is not None and path.exists():
            self._times = self._read(path)
        self._measured(Kernel("product", (1, 8, 8, 8)))  # refuses a provider that is not there

    def of(self, kernel: Kernel) -> float:
        """Return the seconds that one run of a kernel takes."""
        name = f"{kernel.kind} {' '.join(map(str, kernel.sizes))}"
        if name not in self._times:
            self._times[name] = self._measured(kernel)
            if self._kept:
                self.keep()
        return self._times[name]

    def total(self, kernels: Mapping[Kernel, int]) -> float:
        """Return the seconds that kernels take together, each run so often."""
        return sum(count * self.of(kernel) for kernel, count in kernels.items())

    def keep(self) -> None:
        """Write the file, where there is one, now and whenever a time is added from now on."""
        self._kept = True
        if self.path is None:
            return
        with staged_file(self.path, overwrite=True) as file:
            data = {**self._about, "seconds": dict(sorted(self._times.items()))}
            file.write_text(as_json(data, indent=1) + "\n", encoding="utf-8")

    def _read(self, path: Path) -> dict[str, float]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = {name: data[name] for name in self._about}
            times = {str(name): float(seconds) for name, seconds in data["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{path} holds no times of kernels: {error}") from error
        if found != self._about:
            on = "{provider} with {threads} threads".format
            raise BackendError(
                f"{path} holds times of {on(**found)}, not of {on(**self._about)}: name another "
                "file, or measure there"
            )
        return times

    def _measured(self, kernel: Kernel) -> float:
        """Return the shortest of several runs."""
        import onnx

        model, feeds = _model(kernel)
        with TemporaryDirectory() as folder:
            file = Path(folder, "kernel.onnx")
            onnx.save(model, file)
            session = open_session(file, self.provider, self._threads)
            session.run(None, feeds)
            taken: list[float] = []
            while len(taken) < _RUNS or sum(taken) < _SECONDS:
                began = time.perf_counter()
                session.run(None, feeds)
                taken.append(time.perf_counter() - began)
        return min(taken)


def _model(kernel: Kernel) -> tuple[Any, dict[str, Any]]:
    """Return a model of one kernel, and what to run it on."""
    from onnx import TensorProto, helper, numpy_helper

    def drawn(*shape: int) -> Any:
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    if kernel.kind == "product":
        count, rows, inner, columns = kernel.sizes
        feeds = {"x": drawn(rows, inner)} if count == 1 else {"x": drawn(count, rows, inner)}
        other = drawn(inner, columns) if count == 1 else drawn(count, inner, columns)
        held = [numpy_helper.from_array(other, "w")] if count == 1 else []
        feeds |= {} if held else {"w": other}
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    else:
        heads, rows, keys, width, out = kernel.sizes
        feeds = {
            "q": drawn(heads, rows, width),
            "k": drawn(heads, width, keys),
            "v": drawn(heads, keys, out),
        }
        held = []
        nodes = [
            helper.make_node("MatMul", ["q", "k"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["weights"]),
            helper.make_node("MatMul", ["weights", "v"], ["y"]),
        ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in feeds.items()
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "kernel", inputs, [result], held)
    imports = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8), feeds
