"""The ways in which one causal language model comes to run on a CPU, each as something to time.

A model is exported by graphprune, by the model builder of onnxruntime-genai and by the exporter of
transformers, and all of these run in the same ONNX Runtime; or it runs in torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
import transformers as tf

import graphprune as gp
from graphprune import reference

Array = np.ndarray[Any, Any]

DENSE = "dense"
MODELS = {
    DENSE: "",
    "-25 %": "prune{target=ffn,kv-heads ratio=0.25 criterion=l2}",
    "-50 %": "prune{target=ffn,kv-heads ratio=0.5 criterion=l2}",
    "4 KV heads": "merge-kv-heads{groups=4}",
    "1 KV head": "merge-kv-heads{groups=1}",
}
"""What is made of the dense model: the same in every layer, so that its config can hold it."""

OURS = "graphprune"
PORTABLE = "graphprune, portable"
PLAIN = "graphprune, no target"
BUILDER = "genai builder"
BUILDER_PACKAGE = "onnxruntime-genai"
EXPORTER = "OnnxExporter"
EXPORTER_CPU = "OnnxExporter, cpu fusions"
EAGER = "torch eager"
COMPILED = "torch.compile"
IN_TORCH = (EAGER, COMPILED)
ONE_CACHE = "; one cache"
"""Added to a route: past and present are one buffer, which is written in place."""

_TARGETS: dict[str, Any] = {OURS: "cpu", PORTABLE: "portable", PLAIN: None}
_FUSIONS: dict[str, Any] = {EXPORTER: None, EXPORTER_CPU: "cpu"}


@dataclass(frozen=True, order=True)
class Work:
    """One run: so many new tokens, for a batch of one, on so many cached ones."""

    past: int
    new: int

    def __str__(self) -> str:
        return f"{self.new} tokens" if not self.past else f"past {self.past}"


class Runner(Protocol):
    """A model that is ready for one kind of work."""

    def run(self) -> None:
        """Do the work once; this is what is timed."""

    def restore(self) -> None:
        """Bring the cache back to what it was before the run."""

    def logits(self) -> Array:
        """Return what the last run gave for the last position."""


@dataclass(frozen=True)
class Facts:
    """What a run has to read and to compute at least.

    Parameters
    ----------
    parameters
        Elements of all weights.
    matrices
        Elements of the weights that every token is multiplied with: all matrices but the embedding.
    weight_bytes
        Bytes of all weights but the embedding, of which a token reads a row.
    cache_bytes
        Bytes of cache for each cached token.
    query_width
        Query heads times their size, summed over the layers.
    """

    parameters: int
    matrices: int
    weight_bytes: int
    cache_bytes: int
    query_width: int

    @classmethod
    def of(cls, program: gp.Program) -> Facts:
        """Those of a captured decoder."""
        weights = program.weights
        read = {name: each for name, each in weights.items() if "embed_tokens" not in name}
        return cls(
            parameters=sum(each.numel() for each in weights.values()),
            matrices=sum(each.numel() for each in read.values() if each.dim() == 2),
            weight_bytes=sum(each.numel() * each.element_size() for each in read.values()),
            cache_bytes=program.kv_bytes_per_token(),
            query_width=sum(e.shape[0] for name, e in read.items() if "q_proj.weight" in name),
        )

    def read(self, work: Work) -> int:
        """Bytes of weights and cache that are read."""
        return self.weight_bytes + self.cache_bytes * work.past

    def flops(self, work: Work) -> int:
        """Floating-point operations of matrix products and of causal attention."""
        pairs = work.new * work.past + work.new * (work.new + 1) // 2
        return 2 * work.new * self.matrices + 4 * self.query_width * pairs

    def least(self, work: Work) -> int:
        """Say what bounds the run from below: bytes for a single token, operations for a prompt."""
        return self.read(work) if work.new == 1 else self.flops(work)


@dataclass
class Workshop:
    """Makes every form of a model, once, in a folder.

    Parameters
    ----------
    config
        Of the dense model, whose weights are random.
    folder
        Where checkpoints and exports go.
    genai
        An interpreter whose environment has onnxruntime-genai and torch, for the builder.
    """

    config: tf.LlamaConfig
    folder: Path
    genai: Path | None = None
    programs: dict[str, gp.Program] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)

    def program(self, model: str) -> gp.Program:
        """Capture a model."""
        if model not in self.programs:
            if not MODELS[model]:
                torch.manual_seed(0)
                self.programs[model] = gp.capture(tf.LlamaForCausalLM(self.config).eval())
            else:
                pipeline = gp.Pipeline.parse(MODELS[model])
                dense = self.program(DENSE)
                self.programs[model] = pipeline.run(dense, quiet=True).program
        return self.programs[model]

    def checkpoint(self, model: str) -> Path:
        """Store a model as transformers does, with the tokenizer that the builder asks for."""
        path = self._place(model, "checkpoint")
        if not path.exists():
            self.program(model).save_pretrained(path)
            for source in reference.checkpoint_dir().glob("tokenizer*"):
                shutil.copy(source, path)
        return path

    def graph(self, model: str, route: str, work: Work) -> Path:
        """Return the ONNX file that does `work`."""
        if route in _TARGETS:
            path = self._place(model, route) / "model.onnx"
            if not path.exists():
                path.parent.mkdir()
                target = _TARGETS[route]
                self.program(model).export_onnx(path, target=target, check=False)
            return path
        if route == BUILDER:
            return self._built(model) / "model.onnx"
        stage = "decode" if work.past else "prefill"
        return self._exported(model, route) / f"{stage}.onnx"

    def torch_model(self, model: str) -> Any:
        """Load a model as transformers does."""
        if model not in self.loaded:
            path = self.checkpoint(model)
            self.loaded[model] = tf.AutoModelForCausalLM.from_pretrained(path).eval()
        return self.loaded[model]

    def _place(self, model: str, what: str) -> Path:
        return self.folder / re.sub(r"\W+", "-", f"{self.config.hidden_size} {model} {what}")

    def _built(self, model: str) -> Path:
        path = self._place(model, BUILDER)
        if not path.exists():
            assert self.genai is not None
            build(self.genai, self.checkpoint(model), path, "fp32")
        return path

    def _exported(self, model: str, route: str) -> Path:
        """Export the two graphs of `export_for_generation`, for a prompt without padding."""
        from transformers.exporters import OnnxConfig, OnnxExporter

        path = self._place(model, route)
        if not path.exists():
            ids = torch.arange(12).reshape(2, 6)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            config = OnnxConfig(dynamic=True, ort_fusions=_FUSIONS[route])
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = OnnxExporter().export_for_generation(
                    self.torch_model(model), given, config
                )
                exported.save_pretrained(path)
        return path


_BUILD = """
import runpy, sys
from importlib.util import find_spec

# Its modules are top-level ones, as the builder imports them.
sys.path.insert(0, find_spec("onnxruntime_genai.models").submodule_search_locations[0])
from builders import base, gemma

def flat(config):
    kinds = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in kinds:
        config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
        config.rope_theta = kinds["full_attention"]["rope_theta"]
        config.rope_parameters = dict(kinds["full_attention"])

def flattening(method):
    def called(self, config, *further):
        flat(config)
        return method(self, config, *further)
    return called

for kind, name in ((gemma.Gemma3Model, "__init__"), (base.Model, "make_rope_init")):
    setattr(kind, name, flattening(getattr(kind, name)))
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
"""


def build(genai: Path, checkpoint: Path, folder: Path, precision: str, *options: str) -> None:
    """Let the builder of onnxruntime-genai write the model of a checkpoint for the CPU.

    Parameters
    ----------
    genai
        The interpreter that has it.
    checkpoint, folder
        Where the model is, and where it goes.
    precision
        "fp32" or "int4".
    options
        Further ones of the builder, such as ``int4_block_size=32``.

    A config with a rotation for layers with windows and another one for the others, as that of
    Gemma 3, is handed over the way that the builder (0.18) reads it.

    Raises
    ------
    RuntimeError
        When the builder fails, with its last line.
    """
    given = ["-i", checkpoint, "-o", folder, "-p", precision, "-e", "cpu"]
    further = ["--extra_options", *options] if options else []
    ran = subprocess.run(
        [str(genai), "-c", _BUILD, *map(str, given), *further],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if ran.returncode:
        raise RuntimeError(f"the builder: {ran.stderr.strip().splitlines()[-1]}")


def genai_version(python: Path) -> str:
    """Return the version of onnxruntime-genai that an interpreter has."""
    code = f"from importlib.metadata import version; print(version({BUILDER_PACKAGE!r}))"
    ran = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return ran.stdout.strip()


@dataclass(frozen=True)
class Inputs:
    """The same tokens and cache for every route of a model, made from what they are for."""

    config: Any
    work: Work

    @cached_property
    def ids(self) -> Array:
        """``[1, new]``."""
        return np.random.default_rng(0).integers(0, self.config.vocab_size, (1, self.work.new))

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """``[1, KV heads, past, head size]``."""
        config = self.config
        return 1, config.num_key_value_heads, self.work.past, config.head_dim

    def cached(self, layer: int, what: str) -> Array:
        """Keys or values of a layer."""
        generator = np.random.default_rng([layer, what == "value"])
        return generator.standard_normal(self.cache_shape, dtype=np.float32)

    def named(self, name: str) -> Array:
        """Return the input that an ONNX graph calls `name`."""
        past, new = self.work.past, self.work.new
        if name == "input_ids":
            return self.ids
        if name == "attention_mask":
            return np.ones((1, past + new), np.int64)
        if name == "position_ids":
            return np.arange(past, past + new)[None]
        return self.cached(*_cache_of(name))


def _cache_of(name: str) -> tuple[int, str]:
    """Layer, and "key" or "value", of what a graph calls past_key_values.0.key or the like."""
    match = re.search(r"(\d+)\W*(key|value)s?$", name)
    if match is None:
        raise ValueError(f"{name} is no part of a cache")
    return int(match[1]), match[2]


class Sessions:
    """Sessions of ONNX Runtime, one for each file."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.open: dict[Path, onnxruntime.InferenceSession] = {}

    def of(self, path: Path) -> onnxruntime.InferenceSession:
        """Open a session on a file."""
        if path not in self.open:
            self.open[path] = session(path, self.threads)
        return self.open[path]


def session(path: Path, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """Open a session on the CPU, whose threads rest when it does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    # Threads that spin after a run would take their time from who comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OrtRunner:
    """A session with inputs and room for all outputs bound to it."""

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: Inputs, *, one_cache: bool = False
    ) -> None:
        self.session, self.io = session, session.io_binding()
        batch, heads, past, size = inputs.cache_shape
        total = past + inputs.work.new
        self.held: dict[Any, Any] = {}
        for name in (given.name for given in session.get_inputs()):
            array = inputs.named(name)
            if one_cache and array.ndim == 4:
                room = np.zeros((batch, heads, total, size), np.float32)
                room[:, :, :past] = array
                array = room
            key = _cache_of(name) if array.ndim == 4 else name
            self.held[key] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self.io.bind_ortvalue_input(name, self.held[key])
        for name in (given.name for given in session.get_outputs()):
            key = ("new", name)
            if name == "logits":
                shape: tuple[int, ...] = (1, inputs.work.new, inputs.config.vocab_size)
            else:
                shape = (batch, heads, total, size)
                key = _cache_of(name) if one_cache else key
            if key not in self.held:
                made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
                self.held[key] = made
            self.io.bind_ortvalue_output(name, self.held[key])

    def run(self) -> None:
        """Run the session on what is bound."""
        self.session.run_with_iobinding(self.io)

    def restore(self) -> None:
        """Nothing: what was cached is as it was, and what is new is written again."""

    def logits(self) -> Array:
        """Of the last position."""
        found: Array = self.held["new", "logits"].numpy()
        return found[0, -1]


class TorchRunner:
    """A model of transformers: as it is with a cache that grows, or compiled with a static one."""

    def __init__(self, model: Any, inputs: Inputs, *, compiled: bool) -> None:
        self.work, self.ids = inputs.work, torch.from_numpy(inputs.ids)
        self.call: Callable[..., Any] = torch.compile(model) if compiled else model
        total = inputs.work.past + inputs.work.new
        self.cache: Any = (
            tf.StaticCache(config=model.config, max_cache_len=total)
            if compiled
            else tf.DynamicCache(config=model.config)
        )
        if self.work.past:
            for layer in range(model.config.num_hidden_layers):
                pair = (torch.from_numpy(inputs.cached(layer, what)) for what in ("key", "value"))
                self.cache.update(*pair, layer)
        self.compiled = compiled
        self.last: Any = None

    def run(self) -> None:
        """Call the model."""
        with torch.no_grad():
            self.last = self.call(input_ids=self.ids, past_key_values=self.cache).logits

    def restore(self) -> None:
        """Forget the new tokens."""
        if not self.compiled:
            self.cache.crop(-self.work.new)
        else:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.work.past)

    def logits(self) -> Array:
        """Of the last position."""
        found: Array = self.last[0, -1].numpy()
        return found


def torch_runner(shop: Workshop, work: Work, model: str, route: str) -> TorchRunner:
    """Make a model in torch ready for `work`."""
    inputs = Inputs(shop.torch_model(model).config, work)
    if route == COMPILED:
        # What was compiled for other work is looked through at every call.
        torch.compiler.reset()
    return TorchRunner(shop.torch_model(model), inputs, compiled=route == COMPILED)


def ort_runner(shop: Workshop, sessions: Sessions, work: Work, model: str, route: str) -> OrtRunner:
    """Make a model in ONNX Runtime ready for `work`."""
    config = tf.AutoConfig.from_pretrained(shop.checkpoint(model))
    path = shop.graph(model, route.removesuffix(ONE_CACHE), work)
    one_cache = route.endswith(ONE_CACHE)
    return OrtRunner(sessions.of(path), Inputs(config, work), one_cache=one_cache)


def operators(path: Path, inputs: Inputs, folder: Path, runs: int) -> dict[str, list[float]]:
    """How often each operator runs, after ONNX Runtime's own fusions, and ms in it on one thread.

    The time of a node is the median over `runs`.
    """
    profiled = session(path, 1, folder / "profile")
    bound = OrtRunner(profiled, inputs)
    for _ in range(runs + 1):
        bound.run()
    events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    first = min(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
    found: dict[tuple[str, str], list[float]] = {}
    for event in _kernels(events):
        if event["ts"] >= first:
            key = event["args"]["op_name"], event["name"]
            found.setdefault(key, []).append(event["dur"] / 1e3)
    table: dict[str, list[float]] = {}
    for (kind, _), times in found.items():
        entry = table.setdefault(kind, [0, 0.0])
        entry[0] += 1
        entry[1] += float(np.median(times))
    return table


def _kernels(events: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            yield event
