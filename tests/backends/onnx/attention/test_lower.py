"""Attention in ONNX: the best legal form for each layer, equal to the program, or undone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers as tf
from architectures import program_of
from byte_llama import byte_llama
from tiny_models import perturb
from torch import Tensor

from graphprune.analysis.attention.recognize import recognize_attentions
from graphprune.backends.onnx import export as backend
from graphprune.backends.onnx import parity
from graphprune.backends.onnx.attention import forms as attention_forms
from graphprune.backends.onnx.attention.lower import lower_attention
from graphprune.backends.onnx.convert import fuse_norms
from graphprune.backends.onnx.dimension_names import dimension_names
from graphprune.errors import BackendError, UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.compare import relative_error
from graphprune.ir.program import Program, caches_of
from graphprune.passes.export_onnx import ExportOnnx
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.pipeline.pass_base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.plan.plan import Plan

GQA, MHA = "com.microsoft::GroupQueryAttention", "com.microsoft::MultiHeadAttention"


@pytest.fixture(scope="module")
def llama() -> Program:
    """Two layers that differ in query heads, KV heads and intermediate width."""
    program = capture(byte_llama(num_attention_heads=8, num_key_value_heads=8, hidden_size=64))
    passes = (
        MergeKvHeads(groups=4, skip=("model.layers.1.*",)),
        MergeKvHeads(groups=2, skip=("model.layers.0.*",)),
        Prune(target="kv-heads", criterion="l2", ratio=0.5, skip=("model.layers.1.*",)),
    )
    return Pipeline(list(passes)).run(program).program


@pytest.fixture(scope="module")
def exported(llama: Program, tmp_path_factory: pytest.TempPathFactory) -> backend.OnnxReport:
    path = tmp_path_factory.mktemp("gqa") / "model.onnx"
    return backend.export(llama, path, target="cpu")


def session_of(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: str | Path, program: Program, **inputs: Tensor) -> dict[str, Tensor]:
    """The outputs of a model at `path`, which goes by the names of `program`."""
    feeds = {name: tensor.numpy() for name, tensor in program.fill(inputs).items()}
    names = [value.name for value in program.outputs]
    return dict(zip(names, map(torch.from_numpy, session_of(path).run(names, feeds)), strict=True))


def test_layers_of_their_own_sizes_are_one_operator_each(
    llama: Program, exported: backend.OnnxReport
) -> None:
    nodes = [n for n in onnx.load(exported.path).graph.node if n.op_type == "GroupQueryAttention"]
    heads = [
        tuple({a.name: a.i for a in node.attribute}[name] for name in ("num_heads", "kv_num_heads"))
        for node in nodes
    ]
    assert heads == [(4, 2), (8, 2)]
    assert exported.operators[GQA] == 2
    assert not {"Softmax", "Expand", "Pow", "ReduceMean"} & set(exported.operators)
    assert exported.operators["SimplifiedLayerNormalization"] == 1
    assert exported.operators["com.microsoft::SkipSimplifiedLayerNormalization"] == 4
    assert exported.nodes == sum(exported.operators.values())
    assert exported.max_relative_error is not None
    assert exported.max_relative_error < 1e-6


def test_the_report_says_what_each_attention_became(exported: backend.OnnxReport) -> None:
    layer = "model.layers.{}.self_attn"
    assert exported.attention == {
        layer.format(0): "gqa: 4 query heads on 2 KV heads of 8, causal and padding",
        layer.format(1): "gqa: 8 query heads on 2 KV heads of 8, causal and padding",
    }
    assert (exported.target, exported.opset) == ("cpu", 23)
    assert any("pad on the right" in note for note in exported.notes)


def test_weights_keep_their_names_and_nothing_is_left_beside_the_file(
    llama: Program, exported: backend.OnnxReport
) -> None:
    stored = {tensor.name for tensor in onnx.load(exported.path).graph.initializer}
    names = {held.partition(".transposed")[0] for held in stored}
    assert {name for name, kind in llama.kinds.items() if kind == "parameter"} <= names
    assert [entry.name for entry in Path(exported.path).parent.iterdir()] == ["model.onnx"]


def test_rows_padded_on_the_left_come_out_as_no_number(
    llama: Program, exported: backend.OnnxReport
) -> None:
    ids = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = run(exported.path, llama, input_ids=ids, attention_mask=mask)["logits"]
    assert found[0].isnan().all()
    expected = llama(input_ids=ids, attention_mask=mask)["logits"]
    assert relative_error(expected[1], found[1]) < 1e-5


def test_past_and_present_may_share_one_buffer(
    llama: Program, exported: backend.OnnxReport
) -> None:
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(1))
    first = llama(input_ids=ids[:, :8])
    expected = llama(input_ids=ids[:, 8:], **caches_of(first))
    session = session_of(exported.path)
    binding = session.io_binding()
    logits = np.zeros((1, 1, 256), np.float32)
    held: dict[str, Any] = {}
    for name, cache in caches_of(first).items():
        room = np.zeros((1, cache.shape[1], 32, cache.shape[3]), np.float32)
        room[:, :, :8] = cache.numpy()
        held[name] = onnxruntime.OrtValue.ortvalue_from_numpy(room)
        binding.bind_ortvalue_input(name, held[name])
        binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), held[name])
    binding.bind_cpu_input("input_ids", ids[:, 8:].numpy())
    binding.bind_cpu_input("attention_mask", np.ones((1, 9), np.int64))
    held["logits"] = onnxruntime.OrtValue.ortvalue_from_numpy(logits)
    binding.bind_ortvalue_output("logits", held["logits"])
    session.run_with_iobinding(binding)
    found = torch.from_numpy(held["logits"].numpy())
    assert relative_error(expected["logits"], found) < 1e-5
    for name in caches_of(first):
        present = expected[name.replace("past_key_values.", "present.")]
        assert relative_error(present, torch.from_numpy(held[name].numpy())[:, :, :9]) < 1e-5


def test_an_unread_mask_takes_its_subgraph_along(llama: Program) -> None:
    lowered, _ = lower_attention(llama, "cpu", 20)
    before, after = (
        {str(node.target) for node in program.graph.nodes} for program in (llama, lowered)
    )
    assert {"aten.le.Tensor", "aten.index.Tensor"} <= before
    assert not {"aten.le.Tensor", "aten.index.Tensor"} & after


# -- what is legal ---------------------------------------------------------------------------------


def forms(program: Program, target: Any, opset: int = 23) -> list[tuple[str, str]]:
    return [(choice.form, choice.why) for choice in lower_attention(program, target, opset)[1]]


@pytest.mark.parametrize(
    ("name", "target", "opset", "expected"),
    [
        ("llama-gqa", "portable", 23, ["standard"] * 2),
        ("llama-gqa", "portable", 20, ["decomposed"] * 2),
        ("llama-gqa", "tensorrt", 23, ["standard"] * 2),
        ("gemma3", "cpu", 20, ["gqa"] * 3),
        ("llama-eager", "cpu", 20, ["gqa"] * 2),
        ("bert", "cpu", 20, ["mha"] * 2),
        ("bert", "cpu", 23, ["standard"] * 2),
        ("bert", "cuda", 23, ["mha"] * 2),
        ("t5", "cpu", 20, ["mha"] * 6),
        ("resnet", "cpu", 23, []),
    ],
)
def test_each_target_gets_the_best_form_that_it_has(
    name: str, target: Any, opset: int, expected: list[str]
) -> None:
    assert [form for form, _ in forms(program_of(name), target, opset)] == expected


def with_site(program: Program, **changes: Any) -> str:
    """Why GroupQueryAttention does not serve the first attention with `changes`."""
    site = dataclasses.replace(recognize_attentions(program)[0], **changes)  # type: ignore[type-var]
    return attention_forms._not_gqa(site, "cpu", set())  # type: ignore[arg-type]


def test_a_form_that_would_compute_something_else_is_refused() -> None:
    program = program_of("llama-gqa")
    site: Any = recognize_attentions(program)[0]
    assert with_site(program) == ""
    assert with_site(program, caches=None) == "it has no cache"
    bias = dataclasses.replace(site.mask, kind="bias")
    assert with_site(program, mask=bias) == "its mask is bias and padding"
    unpadded = dataclasses.replace(site.mask, padded=False)
    assert with_site(program, mask=unpadded) == "its mask takes no padding"
    assert attention_forms._not_gqa(site, "cuda", set()) == "no kernel of CUDA takes float32"
    shared = {site.caches[0].joined}
    assert attention_forms._not_gqa(site, "cpu", shared) == "its cache is read elsewhere too"
    capped = dataclasses.replace(site, softcap=5.0)
    assert "differ in whether they cap" in attention_forms._not_standard(capped, 23)
    assert attention_forms._not_mha(site) == "2 KV heads would have to be repeated"


def test_head_sizes_decide() -> None:
    narrow = capture(byte_llama(head_dim=12, num_hidden_layers=1))
    ((form, why),) = forms(narrow, "cpu")
    assert form == "standard"
    assert "no gqa, for head size 12 is no multiple of 8" in why
    values = (
        Pipeline([Prune(target="head-dim", criterion="l2", ratio=0.5)])
        .run(program_of("llama-mha"))
        .program
    )
    for form, why in forms(values, "cpu"):
        assert form == "standard"
        assert "keys have size 8 and values 4" in why


def test_caches_count_the_ones_of_a_mask_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("llama-gqa")
    first, not_gqa = recognize_attentions(program)[0].module, attention_forms._not_gqa
    monkeypatch.setattr(
        attention_forms,
        "_not_gqa",
        lambda site, *given: "a reason" if site.module == first else not_gqa(site, *given),
    )
    (one, _), (other, why) = forms(program, "cpu")
    assert (one, other) == ("standard", "standard")
    assert "no gqa, for not every cache can be one" in why


@pytest.mark.slow
def test_chunked_attention_and_whole_beside_it_are_operators_of_onnx(tmp_path: Path) -> None:
    report = backend.export(built("llama4"), tmp_path / "model.onnx", target="cpu")
    assert report.operators["Attention"] == 2, report.notes
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


def test_attention_without_a_cache_keeps_its_parity(tmp_path: Path) -> None:
    for opset, kind in ((20, MHA), (23, "Attention")):
        path = tmp_path / f"{opset}.onnx"
        report = backend.export(program_of("bert"), path, target="cpu", opset=opset)
        assert report.operators[kind] == 2
        assert report.max_relative_error is not None
        assert report.max_relative_error < 1e-5


def built(name: str) -> Program:
    """A small decoder with something of its own in its attention."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model: Any = {
        "gemma2": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(
                **sizes,
                **heads,
                head_dim=8,
                sliding_window=4,
                attn_logit_softcapping=5.0,
                attn_implementation="eager",
            )
        ),
        "mistral": lambda: tf.MistralForCausalLM(
            tf.MistralConfig(**sizes, **heads, sliding_window=4)
        ),
        "gpt-oss": lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(**sizes, **heads, head_dim=8, num_local_experts=4, sliding_window=4)
        ),
        "llama4": lambda: tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(
                **sizes,
                **heads,
                head_dim=8,
                intermediate_size_mlp=24,
                num_local_experts=2,
                attention_chunk_size=4,
                no_rope_layers=[1, 0],
            )
        ),
    }.get(name, lambda: None)()
    return program_of(name) if model is None else capture(perturb(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen3", 2),
        ("gemma2", 2),
        ("gemma3", 3),
        ("mistral", 2),
        ("phi3", 2),
        ("gpt2", 2),
        ("gpt-neox", 2),
        ("opt", 2),
        ("gpt-oss", 2),
        ("llama-eager", 2),
    ],
)
def test_every_attention_of_a_decoder_is_one_operator_that_equals_it(
    name: str, count: int, tmp_path: Path
) -> None:
    report = backend.export(built(name), tmp_path / "model.onnx", target="cpu")
    assert report.operators[GQA] == count, report.attention
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("llama-gqa", 2), ("gemma3", 3), ("vit", 2), ("t5", 6)]
)
def test_what_is_portable_has_no_operator_of_one_runtime(
    name: str, count: int, tmp_path: Path
) -> None:
    report = backend.export(program_of(name), tmp_path / "model.onnx", target="portable")
    assert report.operators["Attention"] == count
    assert not any("::" in operator for operator in report.operators)
    assert "Softmax" not in report.operators
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


# -- the guard -------------------------------------------------------------------------------------


def test_a_fusion_that_changes_outputs_is_undone_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(byte_llama(num_hidden_layers=1))

    def wrong(program: Program, *args: Any, **options: Any) -> Any:
        lowered, choices = lower_attention(program, *args, **options)
        for node in lowered.graph.nodes:
            if "attr_floats" in node.kwargs:
                node.update_kwarg("attr_floats", [2 * node.kwargs["attr_floats"][0]])
        return lowered, choices

    monkeypatch.setattr(backend, "lower_attention", wrong)
    report = backend.export(program, tmp_path / "model.onnx", target="cpu")
    assert GQA not in report.operators
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    assert report.attention == {"model.layers.0.self_attn": "decomposed: gqa failed"}
    assert any("not fused: ONNX Runtime differs" in note for note in report.notes)


def test_norms_that_change_outputs_are_undone_and_attention_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(byte_llama(num_hidden_layers=1))

    def wrong(model: Any) -> int:
        count = fuse_norms(model)
        for node in model.graph:
            if "epsilon" in node.attributes:
                node.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 0.5)
        return count

    monkeypatch.setattr(backend, "fuse_norms", wrong)
    report = backend.export(program, tmp_path / "model.onnx", target="cpu")
    assert report.operators[GQA] == 1
    assert report.operators["ReduceMean"] == 3
    assert any(note.startswith("norms are not fused: ONNX Runtime") for note in report.notes)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


def test_norms_stay_as_they_are_where_there_are_no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter.ort_fusions", None)
    assert fuse_norms(onnx_ir.Model(onnx_ir.Graph((), (), nodes=()), ir_version=8)) == 0


@pytest.mark.slow
def test_padded_rows_are_compared_with_each_row_alone(tmp_path: Path) -> None:
    program = program_of("gemma3")  # its own windows count padding: a row alone differs
    path = tmp_path / "model.onnx"
    backend.export(program, path, check=False)
    names = dimension_names(program)
    with pytest.raises(BackendError, match="differs from the program in logits"):
        parity.compare(program, path, names, counts=True)


def test_a_half_precision_program_is_written_for_cuda_and_compared_on_the_cpu(
    tmp_path: Path,
) -> None:
    half = capture(byte_llama(num_key_value_heads=2, num_hidden_layers=1).half())
    report = backend.export(half, tmp_path / "model.onnx", target="cuda")
    assert report.operators[GQA] == 1
    assert report.opset == 20
    assert report.max_relative_error is not None
    assert 0 < report.max_relative_error < 1e-2
    model = onnx.load(report.path)
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {10}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"target": "cuda"}, BackendError, "float16 or bfloat16, and this one is in float32: load"),
        ({"target": "cdua"}, UsageError, "no target 'cdua': there are portable, tensorrt, cpu, c"),
        ({"target": "cpu", "opset": 99}, UsageError, "opset 99 is unknown to onnx"),
        ({"target": "cpu", "opset": 17}, UsageError, "opset 17 is below 18"),
    ],
)
def test_what_no_kernel_serves_is_refused_before_anything_is_written(
    tmp_path: Path, options: Mapping[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        backend.export(program_of("llama-gqa"), tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_onnx_runtime_does_not_read_is_refused(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(BackendError, match=f"reads no opset {newest}"):
        backend.export(program_of("llama-gqa"), tmp_path / "model.onnx", opset=newest)
    assert not list(tmp_path.iterdir())


def test_the_cpu_takes_no_bfloat16() -> None:
    program = capture(byte_llama(num_hidden_layers=1).bfloat16())
    with pytest.raises(BackendError, match="no kernels for bfloat16"):
        attention_forms.check_target(program, "cpu", 23)
    attention_forms.check_target(program, "cuda", 20)


def test_the_pass_hands_the_target_on(tmp_path: Path) -> None:
    program = capture(byte_llama(num_hidden_layers=1))
    step = ExportOnnx(path=str(tmp_path / "model.onnx"), target="portable", check=False)
    assert str(step).endswith("target=portable check=false}")
    outcome = step.run(program, Context(program, Plan()))
    assert outcome.details["opset"] == 23
    (form,) = outcome.details["attention"].values()
    assert form.startswith("standard")
