"""Quantized weights: ONNX Runtime's own numbers, proven against what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from byte_llama import byte_llama
from command_line import command_line
from torch import nn

import graphprune as gp
from graphprune.backends.onnx.convert import convert, simplify
from graphprune.backends.onnx.export import export
from graphprune.backends.onnx.package import verify_package, write_package
from graphprune.backends.onnx.weights.held import held_weights
from graphprune.backends.onnx.weights.quantize import Quantization, quantize
from graphprune.backends.onnx.weights.quantizers import Algorithm, quantized
from graphprune.errors import BackendError, GraphPruneError, ParityError, UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.pipeline.instruments import Instrument, PassPosition
from graphprune.pipeline.pass_base import Context

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def llama() -> Program:
    torch.manual_seed(0)
    return capture(
        byte_llama(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, tie_word_embeddings=True
        )
    )


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.arange(24).reshape(2, 12) * 7 % 256}]


@pytest.fixture(scope="module")
def package(llama: Program, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    chosen = Quantization("int4")
    write_package(llama, folder, target="cpu", quantization=chosen, samples=samples)
    return folder


@pytest.mark.parametrize(
    ("algorithm", "symmetric"),
    [("default", False), ("default", True), ("hqq", False), ("k-quant", False)],
)
@pytest.mark.parametrize("columns", [64, 48])
def test_values_are_those_that_the_runtime_multiplies_with(
    algorithm: Algorithm, symmetric: bool, columns: int
) -> None:
    helper = onnx.helper
    matrix = np.random.default_rng(0).standard_normal((10, columns), dtype=np.float32)
    blocks = quantized(matrix, 4, 16, algorithm, symmetric=symmetric)
    assert (blocks.zeros is None) == symmetric
    given = {"B": blocks.packed, "S": blocks.scales, "Z": blocks.zeros}
    inits = {name: array for name, array in given.items() if array is not None}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *inits],
        ["y"],
        domain="com.microsoft",
        bits=4,
        block_size=16,
        K=columns,
        N=10,
    )
    kind = onnx.TensorProto.FLOAT
    sizes = {"x": columns, "y": 10}
    ends = [helper.make_tensor_value_info(n, kind, [columns, s]) for n, s in sizes.items()]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in inits.items()]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], held)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    np.testing.assert_allclose(blocks.values().T, found, atol=1e-6)


def test_a_matrix_is_quantized_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.backends.onnx.weights import quantizers

    matrix = np.random.default_rng(0).standard_normal((10, 32), dtype=np.float32)
    whole = quantized(matrix, 8, 32, "default")
    monkeypatch.setattr(quantizers, "_PIECE", 3 * 32 * 4)
    pieces = quantized(matrix, 8, 32, "default")
    for one, other in ((whole.packed, pieces.packed), (whole.scales, pieces.scales)):
        np.testing.assert_array_equal(one, other)


def test_the_graph_reads_blocks_and_one_copy_serves_head_and_embedding(package: Path) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 11  # of a layer two of attention, three of the FFN; the head
    attention = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    assert [list(node.input[1:3]) for node in attention] == [["", ""]] * 2
    assert all(a.i == 4 for n in products for a in n.attribute if a.name == "accuracy_level")
    assert not [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Transpose")]
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
    }
    rows, packed = places[f"{EMBEDDING}.int4.rows"], places[f"{EMBEDDING}.int4"]
    assert (rows["offset"], rows["location"]) == (packed["offset"], packed["location"])
    assert all(len(node.input) == 4 for node in products)  # blocks have zeros of their own


def test_what_positions_rotate_by_is_computed_in_place_of_stored(package: Path) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Cos"), kinds.count("Sin")) == (1, 1)  # layers share them
    assert "model.rotary_emb.inv_freq" in {tensor.name for tensor in model.graph.initializer}
    assert not [t.name for t in model.graph.initializer if t.name.startswith("rotary.")]


def test_it_is_small_and_its_record_says_what_that_cost(package: Path, llama: Program) -> None:
    record = json.loads((package / "parity.json").read_text())["quantization"]
    assert (record["weights"], record["block"], record["activations"]) == ("int4", 32, "int8")
    assert record["zeros"] is True
    assert set(record["distances"]) == {
        n for n, w in llama.weights.items() if w.dim() == 2 and llama.kinds[n] == "parameter"
    }
    assert all(0.01 < distance < 0.2 for distance in record["distances"].values())
    assert record["quality"]["measure"] == "loss"
    assert record["quality"]["quantized"] == pytest.approx(record["quality"]["pruned"], rel=0.1)
    matrices = sum(llama.weights[name].nbytes for name in record["distances"])
    assert (package / "model.onnx.data").stat().st_size < matrices / 4
    assert (
        not (package / "weights.safetensors").exists()
        or (package / "weights.safetensors").stat().st_size < matrices / 4
    )


def test_its_program_has_the_values_that_weights_stand_for(package: Path, llama: Program) -> None:
    loaded, distances = gp.load(package), dict(held_weights(package / "model.onnx", quantized=True))
    assert set(distances) >= {EMBEDDING}
    for name, value in distances.items():
        assert torch.equal(loaded.weight(name), value)
        error = (value - llama.weight(name)).norm() / llama.weight(name).norm()
        assert 0.01 < error < 0.2


def test_it_is_proven_against_these_values_and_measured_again(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command_line(monkeypatch, capsys, package)("verify", package)
    assert done.status == 0
    out = done.out
    assert "15 weights are quantized" in out
    assert "loss on 2 samples" in out
    assert out.splitlines()[-1].startswith(f"verified: {package} gives what its program gives")


def test_it_generates(package: Path) -> None:
    (row,) = gp.OnnxRunner(package).generate([[72, 101, 108]], max_new_tokens=4)
    assert len(row.tokens) == 4


def test_a_model_that_got_worse_is_refused(package: Path, tmp_path: Path) -> None:
    for path in package.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "parity.json").read_text())
    record["quantization"]["quality"]["quantized"] *= 0.9
    (tmp_path / "parity.json").write_text(json.dumps(record))
    with pytest.raises(ParityError, match=r"the loss is \d"):
        verify_package(tmp_path)


class Biased(nn.Module):
    """A product with a bias and one with a weight that is stored transposed, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Parameter(torch.randn(64, 48))
        self.norm = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.addmm(self.norm.bias, self.first(x).relu(), self.second)
        return self.norm(turned)


def test_biases_and_transposed_weights_are_of_no_account(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(Biased().eval(), (torch.randn(3, 32),))
    chosen = Quantization("int8", block=16)
    report = export(program, tmp_path / "m.onnx", target="cpu", quantization=chosen)
    assert set(report.quantized) == {"first.weight", "second"}
    assert report.operators["com.microsoft::MatMulNBits"] == 2
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    assert dict(held_weights(tmp_path / "m.onnx"))["second"].shape == (64, 48)


@pytest.fixture(scope="module")
def model(llama: Program) -> Any:
    model = convert(llama, 23)
    simplify(model, set(llama.weights))
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "weights becomes int4 or int8, not 'int3'"),
        ({"weights": "float"}, "weights becomes int4 or int8, not 'float'"),
        ({"weights": "int4", "block": 24}, "blocks have 16, 32, 64, 128 or 256 numbers, not 24"),
        ({"weights": "int4", "block": 64}, r"blocks of 64 do not divide the 96 columns of .*: 32"),
        ({"weights": "int8", "algorithm": "hqq"}, "no zeros of hqq with 8 bits"),
        ({"weights": "int4", "algorithm": "hqq", "activations": "int8"}, "not for hqq"),
        ({"weights": "int4", "algorithm": "hqq"}, "give embedding=float, or another algorithm"),
        ({"weights": "int4", "embedding": "float"}, "cannot become float and int4"),
    ],
)
def test_what_cannot_be_is_refused(
    llama: Program, model: Any, options: dict[str, Any], message: str
) -> None:
    names = list(model.graph.initializers)
    with pytest.raises(GraphPruneError, match=message):
        chosen = Quantization(**options)
        chosen.check("cpu")
        quantize(model, chosen, llama.weights)
    assert list(model.graph.initializers) == names


def test_a_quantizer_that_is_not_there_is_refused_before_work(
    llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    monkeypatch.delattr(library, "KQuantWeightOnlyQuantConfig")
    monkeypatch.setattr("graphprune.backends.onnx.export.convert", lambda *_: pytest.fail("work"))
    chosen = Quantization("int4", algorithm="k-quant")
    with pytest.raises(BackendError, match="lacks the quantizer 'k-quant'"):
        export(llama, tmp_path / "m.onnx", target="cpu", quantization=chosen)
    with pytest.raises(UsageError, match="the target is cpu or cuda"):
        export(llama, tmp_path / "m.onnx", target="portable", quantization=chosen)


@pytest.mark.parametrize(
    ("target", "by_token", "options", "found"),
    [
        ("cpu", True, {}, "int8"),
        ("cpu", False, {}, "float"),
        ("cuda", True, {}, "float"),
        ("cpu", True, {"algorithm": "hqq"}, "float"),
        ("cpu", True, {"activations": "float"}, "float"),
    ],
)
def test_activations_are_rounded_where_one_token_follows_another_on_a_processor(
    target: Any, by_token: bool, options: dict[str, Any], found: str
) -> None:
    assert Quantization("int4", **options).settled(target, by_token=by_token).activations == found


def test_blocks_of_eight_bits_have_no_zeros() -> None:
    assert [Quantization("int4").symmetric(bits) for bits in (4, 8)] == [False, True]
    assert Quantization("int4", zeros=False).symmetric(4)
    assert not Quantization("int8", algorithm="k-quant").symmetric(8)


def test_options_of_the_pass_say_what_they_are_of() -> None:
    from graphprune.passes.export_onnx import ExportOnnx

    assert str(ExportOnnx(path="p", target="cpu", weights="int4", block=64)) == (
        "export-onnx{path=p target=cpu weights=int4 block=64}"
    )
    assert str(ExportOnnx(path="p", target="cpu", weights="int4", zeros=False)).endswith(
        "weights=int4 zeros=false}"
    )
    with pytest.raises(UsageError, match="block is of quantized weights"):
        ExportOnnx(block=64)


CUT = "prune{target=ffn ratio=0.25 criterion=l2}"
ZEROS = "sparsify{pattern=0.5 criterion=magnitude}"


class _Passes(Instrument):
    """Notes which passes were begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def before_pass(self, position: PassPosition, program: Program, context: Context) -> None:
        self.begun.append(position.pass_.name)


@pytest.mark.parametrize(
    ("passes", "options", "begun"),
    [
        (ZEROS, "target=cpu weights=int4 block=64", []),
        (f"{CUT},{ZEROS}", "target=cpu weights=int4 block=64", ["prune"]),
        (CUT, "target=portable weights=int4", []),
        (CUT, "opset=99", []),
        (CUT, "layout=optimum", []),
    ],
)
def test_what_an_export_refuses_is_refused_before_other_passes_work(
    llama: Program, passes: str, options: str, begun: list[str], tmp_path: Path
) -> None:
    seen, text = _Passes(), f"{passes},export-onnx{{path=p {options}}}"
    with pytest.raises(GraphPruneError, match="export-onnx"):
        gp.Pipeline.parse(text).run(llama, instruments=[seen], output=tmp_path, quiet=True)
    assert seen.begun == begun
    assert not (tmp_path / "p").exists()
