"""Sessions of ONNX Runtime, and a model run beside its program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.onnx.dimension_names import output_names
from graphprune.backends.onnx.weights.blocks import with_activations
from graphprune.errors import BackendError, ParityError, first_line
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.input_sizes import table_rows
from graphprune.ir.program import PAST, PRESENT, Program
from graphprune.ir.sample_inputs import sizes_near_example, whole_batch

_LENGTHS = (7, 11, 13, 17, 19)
_ROOM = 64
"""The length of caches that keep theirs; no check has more tokens."""

_SPARE = 4
"""Rows of a position table left unused: some models start counting at 2."""

_BESIDE = "session.model_external_initializers_file_folder_path"
"""Where external data lies of a model that is given as bytes: ONNX Runtime's own name of it."""

CPU = "CPUExecutionProvider"

_PROVIDERS = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def provider_name(name: str) -> str:
    """Return the execution provider of a short name such as "cuda"; others are as they are."""
    return _PROVIDERS.get(name, name)


def open_session(
    path: Path,
    provider: str = CPU,
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    *,
    whole_activations: bool = False,
) -> Any:
    """Return a session of ONNX Runtime on the model at `path`.

    Parameters
    ----------
    path
        The ONNX model.
    provider
        The execution provider that must run it; nodes that it has no kernel for go to the CPU.
    threads
        Threads of the CPU provider; by default as many as torch has.
    provider_options
        Options of `provider`, as ONNX Runtime names them.
    whole_activations
        Whether products with quantized weights take activations as they are, also where the model
        lets them be rounded.

    Raises
    ------
    BackendError
        When ONNX Runtime is not installed or refuses the model, or another provider would run it
        than was asked for.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("ONNX Runtime is not installed: graphprune[ort] brings it") from error
    # It logs the fallback that is refused here, in several lines of its own.
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    built = onnxruntime.get_available_providers()
    if provider not in built:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} was built without {provider}: it has "
            + ", ".join(built)
        )
    try:
        chosen = (provider, dict(provider_options or {}))
        providers = [chosen] if provider == CPU else [chosen, (CPU, {})]
        given: str | bytes = str(path)
        if whole_activations:
            given = with_activations(path, "float").SerializeToString()
            options.add_session_config_entry(_BESIDE, str(path.parent))
        session = onnxruntime.InferenceSession(given, options, providers=providers)
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the model: {first_line(error)}"
        ) from error
    if provider not in session.get_providers():
        # It falls back by itself, and says so in its log alone.
        raise BackendError(
            f"{provider} does not run here, so ONNX Runtime {onnxruntime.__version__} would use "
            f"{session.get_providers()[0]}: a driver or library that it needs is missing"
        )
    return session


def check_opset(opset: int) -> None:
    """Refuse an `opset` that the ONNX Runtime that is installed, if any, does not read.

    Raises
    ------
    BackendError
        When it does not load a model of one operator.
    """
    import onnx

    try:
        import onnxruntime
    except ImportError:
        return
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [value], [other])
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} reads no opset {opset}: a newer one does, "
            "or an older opset"
        ) from error


class Pair:
    """A program and its ONNX model, compared on every run; errors are kept by the check at hand."""

    def __init__(self, program: Program, session: Any, *, static: bool = False) -> None:
        self.program = program
        self.static = static
        self.session = session
        self.wanted = output_names(program)
        self.check = "run"
        self.errors: dict[str, float] = {}
        self.device = program.device

    def run(
        self, inputs: Mapping[str, Tensor], theirs: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the program's outputs, and ONNX Runtime's on `inputs` with `theirs`."""
        reference = self.ours(inputs)
        found = self.theirs({**inputs, **(theirs or {})})
        for name in reference:
            self.compare(name, reference[name], found[name])
        return reference, found

    def ours(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of the program."""
        ours = self.program(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return {name: tensor.cpu() for name, tensor in ours.items()}

    def theirs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of ONNX Runtime."""
        if self.static:  # caches are longer than what they hold, at both ends
            inputs = {name: _lengthened(name, tensor) for name, tensor in inputs.items()}
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        try:
            arrays = self.session.run(self.wanted, feeds)
        except Exception as error:  # its exceptions share no base but Exception
            sizes = ", ".join(f"{name} {tuple(feed.shape)}" for name, feed in feeds.items())
            raise ParityError(f"ONNX Runtime fails on {sizes}: {first_line(error)}") from error
        names = [value.name for value in self.program.outputs]
        found = {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=True)}
        if self.static:
            held = inputs["attention_mask"].shape[1]
            found = {n: t[:, :, :held] if n.startswith(PRESENT) else t for n, t in found.items()}
        return found

    def in_place(
        self, inputs: Mapping[str, Tensor], caches: Mapping[str, Tensor], room: int
    ) -> dict[str, Tensor]:
        """Return ONNX Runtime's outputs with each past and present in one buffer for `room` tokens.

        `inputs` are all but the caches, which `caches` hold by the names of the outputs.
        """
        import onnxruntime

        binding, held = self.session.io_binding(), {}
        filled = int(inputs["attention_mask"].shape[1])
        for value, wanted in zip(self.program.outputs, self.wanted, strict=True):
            if value.name not in caches:
                binding.bind_output(wanted)
                continue
            cache = caches[value.name]
            buffer = torch.zeros(*cache.shape[:2], room, cache.shape[3], dtype=cache.dtype)
            buffer[:, :, : cache.shape[2]] = cache
            held[wanted] = onnxruntime.OrtValue.ortvalue_from_numpy(buffer.numpy())
            past = PAST + value.name.removeprefix(PRESENT)
            binding.bind_ortvalue_input(past, held[wanted])
            binding.bind_ortvalue_output(wanted, held[wanted])
        for name, tensor in inputs.items():
            if not name.startswith(PAST):
                binding.bind_cpu_input(name, tensor.numpy())
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions share no base but Exception
            raise ParityError(f"ONNX Runtime fails: {first_line(error)}") from error
        arrays = dict(zip(self.wanted, binding.copy_outputs_to_cpu(), strict=True))
        found = {
            v.name: torch.from_numpy(arrays[w])
            for v, w in zip(self.program.outputs, self.wanted, strict=True)
        }
        return {n: t[:, :, :filled] if n in caches else t for n, t in found.items()}

    def compare(self, name: str, reference: Tensor, found: Tensor) -> None:
        """Note how far `found` is from `reference`, and refuse it past the tolerance of its type.

        Raises
        ------
        ParityError
            When type or shape differ, or the relative error is too large.
        """
        if reference.shape != found.shape or reference.dtype != found.dtype:
            raise ParityError(
                f"ONNX Runtime gives {name} as {found.dtype} {tuple(found.shape)}, "
                f"the program as {reference.dtype} {tuple(reference.shape)}"
            )
        error = relative_error(reference, found)
        self.errors[self.check] = max(self.errors.get(self.check, 0.0), error)
        allowed = tolerance_of(reference.dtype)
        if not error <= allowed:
            raise ParityError(
                f"ONNX Runtime differs from the program in {name} ({self.check}): relative error "
                f"{error:.1e}, and {allowed:.0e} is allowed"
            )


def _lengthened(name: str, tensor: Tensor) -> Tensor:
    """Give a cache room behind what it holds."""
    if not name.startswith(PAST):
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, _ROOM - tensor.shape[2]))


def positions(program: Program, names: Mapping[str, str], wanted: int) -> int:
    """Return how many positions may be tried, `wanted` at most.

    The ranges of sizes and the model's position table say so.
    """
    room = wanted
    for symbol, limits in program.ranges.items():
        if names.get(str(symbol)) not in (None, "batch") and limits.upper.is_Integer:
            room = min(room, int(limits.upper))
    for value, node in program.input_nodes():
        rows = table_rows(node) if value.name.endswith("attention_mask") else None
        room = room if rows is None else min(room, rows - _SPARE)
    return max(room, 1)


def sizes_for(program: Program, names: Mapping[str, str], batch: int) -> dict[str, int]:
    """Return a size for every symbol: `batch` or a few more, and lengths of which no two are equal.

    Sizes of images and the like are near the example's, as strides allow.
    """
    lengths = iter(_LENGTHS * len(names))
    near = {names[s]: size for s, size in sizes_near_example(program).items() if s in names}
    chosen: dict[str, int] = {}
    for name in dict.fromkeys(names.values()):
        if name == "batch" or name.endswith("_batch"):
            symbols = (symbol for symbol, of in names.items() if of == name)
            chosen[name] = max(whole_batch(program, symbol, batch) for symbol in symbols)
        else:
            chosen[name] = near[name] if name in near else next(lengths)
    for symbol, name in names.items():
        chosen[name] = program.within(symbol, chosen[name])
    return {symbol: chosen[name] for symbol, name in names.items()}
