"""A program is right at sizes that were not traced, or it refuses them by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from architectures import build
from torch import Tensor, nn
from torch.export import Dim
from transformers.models.bert.modeling_bert import BertIntermediate

import graphprune as gp
from graphprune.backends.archive import archive
from graphprune.errors import UsageError
from graphprune.frontend import from_exported, sizes
from graphprune.weights.files import TensorFile


class Module(nn.Module):
    """Any function after a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def in_chunks(h: Tensor) -> Tensor:
    """Every chunk of four less its own mean."""
    padded = nn.functional.pad(h, (0, 0, 0, (4 - h.shape[1] % 4) % 4))
    parts = [padded[:, at : at + 4] for at in range(0, padded.shape[1], 4)]
    return torch.cat([part - part.mean(1, keepdim=True) for part in parts], 1)[:, : h.shape[1]]


def once(h: Tensor) -> Tensor:
    """In another way for long texts."""
    return h if h.shape[1] < 50 else -h


def in_part(h: Tensor) -> Tensor:
    """Right where a remainder is two: for a length of four alone."""
    return nn.functional.linear(h[:, -1 - 5 % (h.shape[1] - 1) : -1].flatten(1), torch.ones(3, 12))


def in_a_few(h: Tensor) -> Tensor:
    """Right for lengths of three, four and seven."""
    return nn.functional.linear(h[:, 5 % (h.shape[1] - 1) :].flatten(1), torch.ones(3, 12))


def in_pairs(h: Tensor) -> Tensor:
    """Right where a remainder is none: for many lengths."""
    return h[:, : h.shape[1] % 2 + 3].flatten(1) @ torch.ones(18, 3)


def windowed(h: Tensor) -> Tensor:
    """Right at any length; a decision on a size that changes nothing."""
    return h + 0.0 if h.shape[1] > 20 else h


def filtered(h: Tensor) -> Tensor:
    """Right for lengths of four and five, and where what is found broadcasts: of one."""
    return torch.fft.rfft(h, dim=1).abs() * torch.arange(1.0, 4)[:, None]


def captured(function: Callable[[Tensor], Tensor], length: int = 3) -> tuple[gp.Program, nn.Module]:
    torch.manual_seed(0)
    module = Module(function).eval()
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    return gp.capture(module, (torch.randn(2, length, 6),), dynamic_shapes=shapes), module


@pytest.mark.parametrize(
    ("function", "length", "limits"),
    [(in_chunks, 3, (1, 4)), (in_chunks, 7, (0, 8)), (once, 3, (0, 49)), (once, 60, (50, None))],
)
def test_a_length_at_which_the_code_goes_another_way_is_refused_by_name(
    function: Callable[[Tensor], Tensor], length: int, limits: tuple[int, int | None]
) -> None:
    program, module = captured(function, length)
    (symbol,) = program.limits
    assert program.limits[symbol] == limits
    assert [note.kind for note in program.notes] == ["limited-size"]
    for size in (1, 3, 4, 5, 8, 9, 17, 49, 50, 65, 130):
        x = torch.randn(3, size, 6)
        if limits[0] <= size <= (limits[1] or size):
            assert torch.allclose(program(x)["output"], module(x), atol=1e-6)
        else:
            with pytest.raises(UsageError, match=rf"dimension 1 of input 'x' is {size}, and the"):
                program(x)


@pytest.mark.captures_anew
def test_a_checkpoint_is_compared_at_all_sizes_with_few_of_its_weights_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build("llama-gqa").save_pretrained(tmp_path)
    read, reads, compared = TensorFile.read, Counter[str](), Counter[bool | None]()
    monkeypatch.setattr(TensorFile, "read", lambda self, n: (reads.update([n]), read(self, n))[1])
    same = sizes.same
    monkeypatch.setattr(sizes, "same", lambda *a: (found := same(*a), compared.update([found]))[0])
    program = gp.load(tmp_path, memory="1GB")
    assert compared[True] > 3 and set(reads.values()) == {1}
    second = {n for n, w in program.weights.items() if ".layers.1." in n and w.ndim == 2}
    assert len(second) == 7 and second.isdisjoint(reads)
    last = "model.layers.{}.mlp.down_proj.weight"
    assert not torch.equal(*(program.weights[last.format(layer)] for layer in range(2)))
    reads.clear()
    largest = max(weight.nbytes for weight in program.weights.values())
    gp.load(tmp_path, memory=largest + 1)  # too little to hold one of them
    assert max(reads.values()) > 3


@pytest.mark.captures_anew
def test_another_way_at_a_size_is_found_with_the_values_of_one_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build("bert").save_pretrained(tmp_path)
    plain = BertIntermediate.forward
    monkeypatch.setattr(BertIntermediate, "forward", lambda self, x: once(plain(self, x)))
    assert (0, 49) in gp.load(tmp_path, memory="1GB").limits.values()


def test_what_is_numbered_by_itself_keeps_its_own_values() -> None:
    types = torch.float32, torch.float16
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    layers = [f"model.layers.{layer}.mlp.up.weight" for layer in range(2)]
    assert len({from_exported._kind(name, matrix, types[0]) for name in layers}) == 1
    for weight, computed in ((vector, types[0]), (matrix, types[1])):
        assert len({from_exported._kind(name, weight, computed) for name in layers}) == 2
    for each in ("heads.{}.weight", "model.layers.0.experts.{}.up.weight"):
        names = [each.format(number) for number in range(2)]
        assert len({from_exported._kind(name, matrix, types[0]) for name in names}) == 2


def test_a_decision_that_changes_nothing_limits_nothing() -> None:
    program, module = captured(windowed)
    assert not program.limits
    assert not program.notes
    x = torch.randn(1, 130, 6)
    assert torch.allclose(program(x)["output"], module(x), atol=1e-6)


@pytest.mark.parametrize(
    ("function", "limits"), [(in_part, (4, 4)), (in_a_few, (3, 4)), (filtered, (4, 5))]
)
def test_a_size_is_limited_where_the_model_takes_few_others(
    function: Callable[[Tensor], Tensor], limits: tuple[int, int]
) -> None:
    program, _ = captured(function, 4)
    assert list(program.limits.values()) == [limits]
    assert "the model refuses most other sizes" in str(program.notes[0])


def test_a_size_stays_dynamic_where_the_model_takes_some_others() -> None:
    program, module = captured(in_pairs, 4)
    assert not program.limits
    x = torch.randn(3, 8, 6)
    assert torch.allclose(program(x)["output"], module(x), atol=1e-5)


@pytest.mark.parametrize("function", [in_part, in_a_few])
def test_a_length_of_which_the_model_takes_few_is_not_dynamic(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = gp.capture(Module(function).eval(), (torch.randn(2, 4, 6),))
    assert program.inputs[0].shape[1] == 4
    assert isinstance(program.inputs[0].shape[0], str)


def test_a_size_that_an_equation_with_others_leaves_alone_is_not_dynamic(tmp_path: Path) -> None:
    class Thirds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            rows, length, width = x.shape
            return self.linear(x.reshape(rows, length // 3, 3 * width))

    module = Thirds().eval()
    program = gp.capture(module, (torch.randn(2, 9, 4),))
    rows, length, width = program.inputs[0].shape
    assert isinstance(rows, str)
    assert isinstance(length, str)
    assert width == 4
    x = torch.randn(3, 12, 4)
    assert torch.allclose(program(x)["output"], module(x), atol=1e-6)
    assert program.export_onnx(tmp_path / "model.onnx").max_relative_error < 1e-5


def test_limits_stay_with_an_archive(tmp_path: object) -> None:
    program, _ = captured(in_chunks)
    program.save(f"{tmp_path}/archive")
    assert archive.load(f"{tmp_path}/archive").limits == program.limits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 4, 5), "dimension 2 of input 'x' is 5, and the program was captured for 6"),
        (torch.zeros(2, 6), "input 'x' has 2 dimensions, and the program takes 3"),
    ],
)
def test_a_size_that_the_graph_does_not_take_is_named(given: Tensor, message: str) -> None:
    program, _ = captured(windowed)
    with pytest.raises(UsageError, match=message):
        program(given)


def test_sizes_that_differ_where_they_are_one_are_named() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    program = gp.capture(Add(), (torch.zeros(2, 4), torch.zeros(2, 4)))
    with pytest.raises(UsageError, match="dimension 0 of input 'y' is 5, and dimension 0 of input"):
        program(torch.zeros(3, 4), torch.zeros(5, 4))


@pytest.mark.captures_anew
def test_tokens_and_masks_of_one_size_take_one_export(monkeypatch: pytest.MonkeyPatch) -> None:
    exports, export = [], torch.export.export

    def counted(*args: Any, **options: Any) -> Any:
        exports.append(args[0])
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    program = gp.capture(build("bert"))
    shapes = {value.name: value.shape for value in program.inputs}
    assert shapes["input_ids"] == shapes["attention_mask"]
    assert len(exports) == 1


def test_a_size_that_another_follows_at_a_distance_is_not_alone() -> None:
    first, second = sympy.symbols("first second", integer=True)
    conditions, seen = [sympy.Eq(first - second, 3)], {"first": 40, "second": 37}
    assert not sizes._is_alone("first", conditions, seen)
    assert sizes._is_alone("first", [*conditions, sympy.Eq(first * second, 40 * 37)], seen)


class Counted(nn.Module):
    """A batch that Python's own `len` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x).view(len(x) * x.shape[1], -1))
        return found.view(len(x), -1)


def test_the_len_of_a_tensor_is_a_size_like_any_other() -> None:
    model = Counted().eval()
    program = gp.capture(model, (torch.randn(2, 4, 6),))
    assert not program.notes
    x = torch.randn(5, 3, 6)
    torch.testing.assert_close(program(x)["output"], model(x))
    assert len(x) == 5 and "len" not in globals()


def test_a_size_that_operators_refuse_is_named_with_their_reason(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Pairs(Counted):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.first(x).reshape(x.shape[0] // 2, 2, 8).unbind(1)
            found: Tensor = self.last(first * second)
            return found

    program = gp.capture(Pairs().eval(), (torch.randn(4, 6),))
    assert program(torch.randn(6, 6))["output"].shape == (3, 3)
    with pytest.raises(UsageError, match=r"does not run on x of \(5, 6\): shape '\[2, 2, 8\]'"):
        program(torch.randn(5, 6))
    assert capfd.readouterr() == ("", "")


def test_an_example_without_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="example input 'x' has no rows"):
        gp.capture(Counted(), (torch.randn(0, 4, 6),))


def test_a_batch_that_is_worth_little_more_than_the_example_is_said_to_be_fixed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Three(Counted):
        def forward(self, x: Tensor) -> Tensor:
            first, *others = self.first(x).chunk(3)
            found: Tensor = self.last(first * sum(others))
            return found

    program = gp.capture(Three().eval(), (torch.randn(6, 5, 6),))
    assert program.inputs[0].shape[0] == 6
    assert [note.text.partition(": ")[0] for note in program.notes] == [
        "dimension 0 of x is 6 alone"
    ]
    assert capfd.readouterr() == ("", "")
