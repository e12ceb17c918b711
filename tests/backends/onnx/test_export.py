"""ONNX models: named, checked, equal to their program in ONNX Runtime, and complete or absent."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from byte_llama import byte_llama
from torch import Tensor, library, nn
from torch.export import Dim

from graphprune.backends.onnx import export as backend
from graphprune.backends.onnx.weights.held import held_weights
from graphprune.errors import BackendError, OutputError, UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.weights.deferred import Deferred


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture(byte_llama(num_key_value_heads=2, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def exported(llama: Program, tmp_path_factory: pytest.TempPathFactory) -> backend.OnnxReport:
    return backend.export(llama, tmp_path_factory.mktemp("onnx") / "model.onnx")


class Block(nn.Module):
    """A convolution whose result is changed in place, and outputs of every awkward kind."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Linear(4, 5)

    def forward(self, image: Tensor, other: Tensor) -> dict[str, Tensor]:
        hidden = self.convolution(image)
        hidden.div_(2)
        pooled = hidden.mean((2, 3))
        return {
            "scores": self.classifier(pooled) @ other.T,
            "image": image,
            "weight": self.classifier.weight,
            "unique": torch.unique(pooled),
        }


@pytest.fixture(scope="module")
def block() -> Program:
    torch.manual_seed(0)
    return capture(Block(), (torch.randn(2, 3, 8, 8), torch.randn(4, 5)))


def sizes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_a_decoder_is_one_graph_with_named_sizes(
    llama: Program, exported: backend.OnnxReport
) -> None:
    graph = onnx.load(exported.path).graph
    past, present = ["batch", 2, "past_sequence", 8], ["batch", 2, "total_sequence", 8]
    caches = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert sizes(graph.input) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        **{f"past_key_values.{cache}": past for cache in caches},
    }
    assert sizes(graph.output) == {
        "logits": ["batch", "sequence", 256],
        **{f"present.{cache}": present for cache in caches},
    }
    assert [value.name for value in graph.input] == [value.name for value in llama.inputs]


def test_weights_keep_their_names_and_tied_ones_are_stored_once(
    llama: Program, exported: backend.OnnxReport
) -> None:
    stored = {
        tensor.name: tuple(tensor.dims) for tensor in onnx.load(exported.path).graph.initializer
    }
    for name, weight in llama.weights.items():
        if llama.kinds[name] == "parameter":
            turned = stored.get(f"{name}.transposed", ())
            assert stored.get(name, turned[::-1]) == tuple(weight.shape)
    assert "lm_head.weight" not in stored
    assert llama.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    held = sum(weight.nbytes for weight in llama.weights.values())
    assert exported.bytes < held + 60_000


def test_no_symbol_and_no_path_of_this_machine_is_left(exported: backend.OnnxReport) -> None:
    data = Path(exported.path).read_bytes()
    for text in (b"site-packages", b".py", b"stack_trace", str(Path.home()).encode()):
        assert text not in data
    names = {
        size.dim_param
        for value in onnx.load(exported.path).graph.value_info
        for size in value.type.tensor_type.shape.dim
        if size.dim_param
    }
    assert names <= {"batch", "sequence", "past_sequence", "total_sequence"}


def test_the_report_says_what_happened(exported: backend.OnnxReport) -> None:
    as_json = json.loads(json.dumps(exported.to_dict()))
    assert as_json["max_relative_error"] is not None
    assert as_json["max_relative_error"] < 1e-5
    assert as_json["opset"] == 20
    assert as_json["bytes"] == Path(exported.path).stat().st_size
    assert as_json["nodes"] == len(onnx.load(exported.path).graph.node)
    assert as_json["onnxruntime"] == onnxruntime.__version__
    assert as_json["seconds"] > 0
    assert as_json["notes"] == []


def test_onnx_runtime_decodes_the_tokens_of_the_program(
    llama: Program, exported: backend.OnnxReport
) -> None:
    """Written apart from the back end's own check: greedy tokens from a prompt of five."""
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(7))
    tokens = [ids]
    past = {
        value.name: torch.zeros(2, 2, 0, 8)
        for value in llama.inputs
        if value.name.startswith("past_key_values.")
    }
    for _ in range(4):
        mask = torch.ones(2, sum(part.shape[1] for part in tokens), dtype=torch.int64)
        feeds = {"input_ids": tokens[-1], "attention_mask": mask, **past}
        results = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        outputs = dict(zip([o.name for o in session.get_outputs()], results, strict=True))
        whole = llama(input_ids=torch.cat(tokens, 1))["logits"][:, -1]
        last = torch.from_numpy(outputs["logits"])[:, -1]
        torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)
        tokens.append(whole.argmax(-1, keepdim=True))
        past = {
            name.replace("present.", "past_key_values."): torch.from_numpy(array)
            for name, array in outputs.items()
            if name != "logits"
        }


def test_the_program_is_left_as_it_was(block: Program) -> None:
    before, targets = block.fingerprint(), [str(node.target) for node in block.graph.nodes]
    for _ in range(2):
        backend.convert(block, 20)
    assert block.fingerprint() == before
    assert [str(node.target) for node in block.graph.nodes] == targets


def test_changes_in_place_and_awkward_outputs_are_exported(block: Program, tmp_path: Path) -> None:
    report = backend.export(block, tmp_path / "block.onnx")
    graph = onnx.load(report.path).graph
    assert sizes(graph.input) == {"image": ["batch", 3, 8, 8], "other": ["other_batch", 5]}
    assert sizes(graph.output) == {
        "scores": ["batch", "other_batch"],
        "image_output": ["batch", 3, 8, 8],
        "weight": [5, 4],
        "unique": ["data_dependent_0"],
    }
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


def test_external_data_lies_beside_the_file_under_its_name(block: Program, tmp_path: Path) -> None:
    report = backend.export(block, tmp_path / "block.onnx", external_data=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["block.onnx", "block.onnx.data"]
    assert report.bytes == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    model = onnx.load(report.path, load_external_data=False)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"block.onnx.data"}


def test_external_data_is_written_a_weight_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    program = capture(layers, (torch.randn(2, 32),))
    values = {name: weight.detach().bfloat16() for name, weight in program.weights.items()}
    there: list[weakref.ref[Tensor]] = []
    most = 0

    def making(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            nonlocal most
            found = values[name].float()
            there.append(weakref.ref(found))
            most = max(most, sum(each() is not None for each in there))
            return found

        return make

    weights = {n: Deferred(making(n), w.shape, w.dtype) for n, w in program.weights.items()}
    stored = dataclasses.replace(program, weights=weights)
    backend.export(stored, tmp_path / "model.onnx", external_data=True, check=False)
    assert there and most == 1
    held = dict(held_weights(tmp_path / "model.onnx"))
    assert all(torch.equal(held[name], value.float()) for name, value in values.items())


def test_large_weights_go_to_external_data_by_themselves(
    block: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_LARGEST", 100)
    backend.export(block, tmp_path / "a.onnx", check=False)
    assert (tmp_path / "a.onnx.data").is_file()
    with pytest.raises(BackendError, match="need external data"):
        backend.export(block, tmp_path / "b.onnx", check=False, external_data=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]


def test_nothing_is_shown(
    block: Program, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backend.export(block, tmp_path / "block.onnx")
    assert capfd.readouterr() == ("", "")


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-8).sqrt()


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(nn.functional.pad(-x.abs() - 1, (1, 1, 1, 1)), 2)


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 - (x > 0).to(torch.int64))


class Thirds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.cat([x, x * 2, x * 3], 2).chunk(3, 2)
        return first * second - third


@pytest.mark.parametrize(
    ("module", "scale"),
    [
        pytest.param(Scaled(), 1e-4, id="an epsilon that is nearly zero"),
        pytest.param(Padded(), 1.0, id="zeros before a pool of maxima"),
        pytest.param(Masked(), 1.0, id="a whole number from a real one"),
        pytest.param(Thirds(), 1.0, id="pieces of a dynamic size"),
    ],
)
def test_what_the_exporter_or_onnx_runtime_get_wrong_is_written_otherwise(
    module: nn.Module, scale: float, tmp_path: Path
) -> None:
    sizes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
    example = (torch.randn(2, 3, 6, 8) * scale,)
    program = capture(module, example, dynamic_shapes=sizes)
    path = tmp_path / "model.onnx"
    report = backend.export(program, path)
    assert report.max_relative_error is not None
    x = torch.randn(3, 3, 6, 8) * scale
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-5, atol=1e-5)


def test_a_stride_of_an_input_is_read_from_its_sizes(tmp_path: Path) -> None:
    """As the exporter does by itself for an input whose last dimension is of a single place."""

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((0, 1, 3)) + torch.arange(x.shape[2])

    sizes = ({2: torch.export.Dim.AUTO},)
    program = capture(Counted(), (torch.randn(2, 4, 6, 1),), dynamic_shapes=sizes)
    (length,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    length.target, length.args = torch.ops.aten.sym_stride.int, (length.args[0], 1)
    report = backend.export(program, tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


@library.custom_op("graphprune_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mysterious(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.graphprune_tests.mystery(x) + 1


def test_an_operator_without_a_counterpart_is_named_with_its_place(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Mysterious())
    program = capture(model, (torch.randn(2, 4),))
    with pytest.raises(BackendError) as caught:
        backend.export(program, tmp_path / "model.onnx")
    message = str(caught.value)
    assert "graphprune_tests.mystery.default has no counterpart" in message
    assert "at 1, test_export.py:" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["convert", "simplify", "_save", "_check"])
@pytest.mark.parametrize("error", [BackendError("no"), KeyboardInterrupt()])
def test_a_failure_at_any_stage_leaves_nothing(
    block: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: BaseException,
) -> None:
    original = getattr(backend, stage)

    def fail(*args: Any) -> None:
        original(*args)
        raise error

    monkeypatch.setattr(backend, stage, fail)
    with pytest.raises(type(error)):
        backend.export(block, tmp_path / "block.onnx", external_data=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_differs_is_refused(
    block: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = backend.simplify

    def spoil(model: Any, weights: set[str]) -> None:
        original(model, weights)
        value = model.graph.initializers["classifier.weight"]
        spoiled = value.const_value.numpy() * np.float32(1.001)
        value.const_value = onnx_ir.tensor(spoiled, name=value.name)

    monkeypatch.setattr(backend, "simplify", spoil)
    with pytest.raises(
        BackendError, match=r"differs from the program in scores \(batch of 3\): relative"
    ):
        backend.export(block, tmp_path / "block.onnx")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused_before_any_work(
    block: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "convert", lambda *_: pytest.fail("must not get here"))
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "m.onnx"):
        with pytest.raises(OutputError):
            backend.export(block, target)
    assert (tmp_path / "file").read_text() == "x"


def test_a_program_without_weights_and_an_old_opset_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        program = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(BackendError, match="on the meta device"):
        backend.export(program, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="opset 17 is below 18"):
        backend.export(program, tmp_path / "m.onnx", opset=17)
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_runtime_the_report_says_so(
    block: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    report = backend.export(block, tmp_path / "block.onnx")
    assert report.max_relative_error is None
    assert report.onnxruntime is None
    assert report.notes[-1] == "ONNX Runtime is not installed, so the model was checked but not run"
    assert (tmp_path / "block.onnx").is_file()


def test_what_draws_at_random_is_written_and_not_compared(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    program = capture(Noisy(), (torch.randn(2, 3),))
    report = backend.export(program, tmp_path / "noisy.onnx")
    assert report.max_relative_error is None
    assert any("randn_like" in note and "draws at random" in note for note in report.notes)
    assert (tmp_path / "noisy.onnx").is_file()


def test_few_positions_mean_fewer_decoded_tokens(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=31,
        n_positions=14,
        bos_token_id=0,
        eos_token_id=0,
    )
    report = backend.export(capture(GPT2LMHeadModel(config)), tmp_path / "model.onnx")
    assert report.notes == ("3 decode steps: the model has 10 positions to try",)
    assert report.max_relative_error is not None


# -- dynamic sizes --------------------------------------------------------------------------------


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / x.shape[1]


def test_a_size_that_the_exporter_fixes_is_refused_and_stays_dynamic_in_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = capture(_Scaled(), (torch.randn(2, 12, 8),), dynamic_shapes=shapes)
    ((_, node),) = program.input_nodes()
    sizes = str(node.meta["val"].shape)
    original = torch.onnx.export

    def fixing(exported: Any, *args: Any, **options: Any) -> Any:
        # As a decomposition does that treats a size of its own kind.
        assert node.meta["val"].shape[1] == 12
        return original(exported, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", fixing)
    with pytest.raises(BackendError, match=r"dimension 1 of x \(x_dim_1\) is fixed at 12"):
        backend.export(program, tmp_path / "model.onnx")
    assert str(node.meta["val"].shape) == sizes
    monkeypatch.undo()
    report = backend.export(program, tmp_path / "model.onnx")
    assert report.max_relative_error is not None


def test_sizes_that_are_multiples_of_a_dynamic_one_are_exported(tmp_path: Path) -> None:
    unit = Dim("unit", min=2, max=8)
    model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(4, 4, 1))
    shapes = ({0: Dim.AUTO, 2: 8 * unit, 3: 8 * unit},)
    program = capture(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    backend.export(program, tmp_path / "model.onnx")
    dims = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims][2:] == ["8*input_dim_2_unit"] * 2


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.ConvTranspose2d(16, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x).relu()
        up = self.up(self.deep(down).relu())
        return self.out(torch.cat([down, up], 1))


def test_images_are_checked_at_sizes_that_strides_divide(tmp_path: Path) -> None:
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    program = capture(_UNet().eval(), (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    report = backend.export(program, tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert all(isinstance(program.inputs[0].shape[dim], str) for dim in (0, 2, 3))


@pytest.mark.parametrize("pieces", [2, 3])
def test_a_batch_that_is_taken_in_pieces_is_exported_and_checked(
    pieces: int, tmp_path: Path
) -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if pieces == 3:
                one, two, three = h.chunk(3)
                return self.last(one * two - three)
            return self.last(h.reshape(x.shape[0] // 2, 2, 8).prod(1))

    program = capture(Pieces().eval(), (torch.randn(2 * pieces, 6),))
    report = program.export_onnx(tmp_path / "pieces.onnx")
    assert report.max_relative_error <= 1e-5
    assert set(report.parity) == {
        f"batch of {pieces}",
        f"batch of {2 * pieces if pieces < 3 else 3}",
    }


@pytest.mark.parametrize("places", [1, 3])
def test_a_pool_of_dynamic_sizes_is_exported_to_one_place_alone(
    places: int, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(places))
    program = capture(model, (torch.randn(2, 4, 9),))
    if places == 1:
        assert backend.export(program, tmp_path / "pool.onnx").parity
        return
    with pytest.raises(BackendError, match=r"adaptive_avg_pool1d.* in 0.* pools dynamic sizes to"):
        backend.export(program, tmp_path / "pool.onnx")
    assert not list(tmp_path.iterdir())
