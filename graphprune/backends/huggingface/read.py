"""Read a Hugging Face directory: its files are checked, its model loaded and captured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from graphprune.backends.huggingface.layers.modeling_file import FILE, modeling_text, pruned_class
from graphprune.backends.huggingface.model import quiet
from graphprune.errors import CheckpointError, first_line, last_line
from graphprune.frontend.capture import capture
from graphprune.frontend.torch_export import evaluation_mode
from graphprune.frontend.transformers_models import capture_transformers
from graphprune.io.whole_files import refuse_stand_in
from graphprune.ir.program import Note, Program
from graphprune.weights.deferred import made
from graphprune.weights.files import header_of, is_finite
from graphprune.weights.models import leave_zeros
from graphprune.weights.pickled import pickled_tensors
from graphprune.weights.placement import Placement
from graphprune.weights.recorded import RecordedFile
from graphprune.weights.tensors import floating_type


def read(
    path: Path,
    *,
    dtype: str | torch.dtype = "auto",
    placement: Placement = Placement(),  # noqa: B008 - it never changes
    cache: bool | None = None,
) -> Program:
    """Load and capture the model in the directory `path`, which is only read.

    Parameters
    ----------
    path
        A directory with a config and weights.
    dtype, cache
        As `graphprune.load` takes them.
    placement
        Where the program is to compute, and how much it may hold.

    Raises
    ------
    CheckpointError
        When a file is missing, cut short or malformed, a weight is missing or holds NaN or
        infinity (where there is a limit of memory, when it is used), or transformers does not know
        the kind of model.
    CaptureError
        When the model cannot become a graph.
    """
    wanted = _dtype(dtype)
    with quiet():
        stored, apart, config, model_class = _described(path)
        on_cpu = placement.device is None or placement.device.type == "cpu"
        compute = wanted or (torch.float32 if on_cpu else stored or config.dtype or torch.float32)
        model, unread = _model(path, config, model_class, compute, placement.memory)
        program = capture(model, cache=cache)
    del model
    program = _from_files(program, path, stored, apart, unread, placement)
    return _held(path, program, whole=wanted is not None)


def read_unrun(path: Path, placement: Placement) -> Program:
    """Load the model in `path` to be changed and written, not run.

    The sizes of a decoder that would be dynamic are numbers. Its constants have values, and its
    weights lie in their files; each is checked to be finite when it is used.

    Raises
    ------
    CheckpointError, CaptureError
        As `read` does.
    """
    with quiet():
        stored, apart, config, model_class = _described(path)
        model, unread = _model(path, config, model_class, torch.float32)
        with evaluation_mode(model):
            program = capture_transformers(model, fixed=True)
    return _from_files(program, path, stored, apart, unread, placement)


def _held(path: Path, program: Program, *, whole: bool) -> Program:
    """Return `program` with weights that are known to be finite, as far as memory is unlimited.

    They are held as the graph computes with them where `whole` is said, or on another device.
    """
    limited = program.placement.memory is not None
    weights = program.operands if whole else dict(program.weights)
    if not limited:
        if whole or program.device.type != "cpu":
            weights = {n: made(w).to(program.device) for n, w in weights.items()}
        for name, weight in weights.items():
            if not is_finite(made(weight)):
                raise CheckpointError(f"{path}: the weight {name} holds NaN or infinity")
    return dataclasses.replace(program, weights=weights)


def read_structure(path: Path) -> Program:
    """Capture the model in the directory `path` without its weights, to be looked into.

    Parameters
    ----------
    path
        A directory with a config and weights, of which the headers alone are read.

    Raises
    ------
    CheckpointError
        When a file is missing, cut short or malformed, holds weights of other sizes than the config
        describes, or transformers does not know the kind of model.
    CaptureError
        When the model cannot become a graph without its weights.
    """
    with quiet():
        stored, apart, config, model_class = _described(path)
        make = getattr(model_class, "from_config", None) or model_class._from_config
        with _refusing(path, config), torch.device("meta"):
            model = make(config, dtype=torch.float32)
        unread = _check_fit(path, config, model_class)
        program = capture(model)
    return _from_files(program, path, stored, apart, unread)


def _described(path: Path) -> tuple[torch.dtype | None, dict[str, torch.dtype], Any, Any]:
    """Return what the files say but for weights: stored types, config and class of the model."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds an adapter and no model: merge it with peft (merge_and_unload), and "
            "give what that saves"
        )
    fields = _read_json(path / "config.json")
    types = check_files(path)
    config = _config(path, fields)
    return *types, config, _model_class(path, config)


def _from_files(
    program: Program,
    path: Path,
    stored: torch.dtype | None,
    apart: dict[str, torch.dtype],
    unread: Sequence[str],
    placement: Placement = Placement(),  # noqa: B008 - it never changes
) -> Program:
    """Return `program`, whose source says where it came from and what is stored there."""
    assert program.source is not None
    source = dataclasses.replace(
        program.source, directory=path, stored_dtype=stored, stored_apart=apart
    )
    notes = program.notes
    if unread:
        what = f"the weight {unread[0]}" if len(unread) == 1 else f"{len(unread)} weights"
        example = "" if len(unread) == 1 else f", such as {unread[0]}"
        text = f"its files hold {what} that its config has no place for{example}: not used"
        notes = (*notes, Note("unread-weights", text))
    return dataclasses.replace(program, source=source, placement=placement, notes=notes)


def _dtype(given: str | torch.dtype) -> torch.dtype | None:
    """Return the type that `given` is or names; None for "auto"."""
    if given == "auto":
        return None
    named = given.removeprefix("torch.") if isinstance(given, str) else given
    if (found := floating_type(named)) is None:
        raise CheckpointError(f"dtype is {given!r}, which names no floating type of torch")
    return found


# -- files --------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        refuse_stand_in(path, CheckpointError)
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no object")
    return fields


def check_files(path: Path) -> tuple[torch.dtype | None, dict[str, torch.dtype]]:
    """Refuse weight files that are missing or cut short.

    Returns the floating type that most tensors have, and those of the others by name.

    Raises
    ------
    CheckpointError
        Naming the file.
    """
    types = {name: kind for file in _weight_files(path) for name, kind in _types(file).items()}
    if not types:
        return None, {}
    ((most, _),) = Counter(types.values()).most_common(1)
    return most, {name: kind for name, kind in types.items() if kind is not most}


def _weight_files(path: Path) -> list[Path]:
    """Return the files that transformers takes weights from, in its order of preference."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            placed = _read_json(index).get("weight_map")
            if not isinstance(placed, dict) or not all(isinstance(f, str) for f in placed.values()):
                raise CheckpointError(f"{index} has no weight_map of names to files")
            return sorted({path / file for file in placed.values()})
    raise CheckpointError(f"{path} holds no model.safetensors")


def _types(file: Path) -> dict[str, torch.dtype]:
    """Return the types of the floating tensors of a file by name."""
    held = pickled_tensors(file) if file.suffix == ".bin" else header_of(file)
    types = {name: each.dtype for name, each in held.items()}
    return {name: kind for name, kind in types.items() if kind and kind.is_floating_point}


def shapes_of(directory: str | PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the safetensors files of a directory, by name.

    Only headers are read.

    Raises
    ------
    CheckpointError
        When a file is cut short or malformed.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    return {name: entry.shape for file in files for name, entry in header_of(file).items()}


# -- transformers -------------------------------------------------------------------------------


def _config(path: Path, fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # configs validate themselves in many ways
        kind = fields.get("model_type")
        from transformers import CONFIG_MAPPING

        if kind is None:
            raise CheckpointError(f"{path / 'config.json'} names no model_type") from error
        if kind not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{path / 'config.json'}: transformers does not know the model type {kind!r}"
            ) from error
        why = first_line(error)
        why += f" {last_line(error)}" if why.endswith(":") else ""  # a validator's reason
        why += _odd_sizes([(fields, CONFIG_MAPPING[kind])])
        raise CheckpointError(f"{path / 'config.json'} is no valid config: {why}") from error
    for part in _parts(config):
        for name in _SIZES:
            own, size = part.attribute_map.get(name, name), getattr(part, name, None)
            if isinstance(size, str | float | bool) or (isinstance(size, int) and size < 1):
                raise CheckpointError(
                    f"{path / 'config.json'} is no valid config: {own} is {size!r}, not a number "
                    "from 1 on"
                )
    return config


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What configs can be asked for whatever their own names for it are; no model has none of them."""


def _parts(config: Any) -> Iterator[Any]:
    """Yield `config` and the configs in it."""
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None and not isinstance(inner, dict):
            yield from _parts(inner)


@contextlib.contextmanager
def _refusing(path: Path, config: Any) -> Iterator[None]:
    """Turn whatever fails while a model is made of `config` into one line that names odd sizes."""
    try:
        yield
    except Exception as error:  # readers and model code may refuse in any way
        odd = _odd_sizes((vars(part), type(part)) for part in _parts(config))
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}{odd}") from error


def _odd_sizes(parts: Iterable[tuple[Mapping[str, Any], type]]) -> str:
    """Name the whole numbers below 1 in fields of configs, where their classes have others."""
    odd = [
        f"{name} is {value}"
        for fields, kind in parts
        for name, value in fields.items()
        if type(value) is int and value < 1 and getattr(kind, name, value) != value
        if not name.endswith("_id")
    ]
    return f" ({', '.join(odd)})" if odd else ""


def _model_class(path: Path, config: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    name = names[0] if names else ""
    if hasattr(config, "graphprune"):
        base = getattr(transformers, name.removeprefix("Pruned"), None)
        file = path / FILE
        if base is None or not file.is_file():
            raise CheckpointError(f"{path} holds no {FILE} for its architecture {name!r}")
        if file.read_text(encoding="utf-8") != modeling_text(base):
            raise CheckpointError(f"{file} is not the file that graphprune writes: it is not run")
        return pruned_class(base)
    if hasattr(transformers, name):
        return getattr(transformers, name)
    if name and hasattr(config, "auto_map"):
        raise CheckpointError(
            f"{path / 'config.json'}: {name} is code that comes with the checkpoint, which is "
            "not run: load it with transformers and give the model to graphprune.capture"
        )
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise CheckpointError(f"{path / 'config.json'}: transformers has no model for {name!r}")


def _model(
    path: Path, config: Any, model_class: Any, dtype: torch.dtype, memory: int | None = None
) -> tuple[Any, list[str]]:
    """Load the model, and return the names in its files that it has no weight for.

    Its weights stay in their files where the loader can leave them there.
    """
    try:
        with _left_in_files():
            model, info = _loaded(path, config, model_class, dtype)
        leave_zeros(model, memory)
    except CheckpointError:
        # What it does to the weights cannot be put off; or it fails, and says why below.
        model, info = _loaded(path, config, model_class, dtype)
    return model, _fit(path, info)


def _check_fit(path: Path, config: Any, model_class: Any) -> list[str]:
    """Do as `_fit` does, where no value must be read for it."""
    if all(file.suffix == ".safetensors" for file in _weight_files(path)):
        try:
            with _left_in_files():
                _, info = _loaded(path, config, model_class, torch.float32)
        except CheckpointError:
            return []  # what it does to the weights cannot be put off
        return _fit(path, info)
    return []


def _fit(path: Path, info: Mapping[str, Any]) -> list[str]:
    """Refuse what a loader says is missing or of another size, and return what it did not use."""
    if missing := info["missing_keys"]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path} lacks the weight {min(missing)}{more}")
    for name, stored, due in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{path}: the weight {name} is {tuple(stored)}, and its config makes it {tuple(due)}"
        )
    return sorted(info["unexpected_keys"])


@contextlib.contextmanager
def _left_in_files() -> Iterator[None]:
    """Let transformers load tensors that are read where they are used.

    Its own code renames, splits and merges what a checkpoint holds. Running on tensors that
    remember what is done to them, it tells what every weight is made of.
    """
    from transformers import modeling_utils

    opener = modeling_utils.safe_open
    modeling_utils.safe_open = RecordedFile
    try:
        yield
    finally:
        modeling_utils.safe_open = opener


def _loaded(path: Path, config: Any, model_class: Any, dtype: torch.dtype) -> Any:
    with _refusing(path, config):
        return model_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
        )
