"""Modules as users have them: wrapped, with odd signatures and outputs, in regions, or no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from byte_llama import byte_llama
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import graphprune as gp
from graphprune.backends.archive import archive
from graphprune.errors import CaptureError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


X = torch.randn(2, 8)


# -- what a module is wrapped in ------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_wraps_a_module_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Net().eval()
    program = gp.capture(wrap(net), (X,))
    assert set(program.weights) == set(net.state_dict())
    assert torch.allclose(program(X)["output"], net(X))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.jit.trace(Net().eval(), X), "TorchScript"),
        (lambda: torch.jit.script(Net().eval()), "TorchScript"),
        (lambda: torch.export.export(Net().eval(), (X,)), "ExportedProgram"),
        (lambda: torch.export.export(Net().eval(), (X,)).module(), "an exported graph"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_code_is_refused_with_what_to_give(
    make: Callable[[], nn.Module], what: str
) -> None:
    with pytest.raises(CaptureError, match=rf"{what}.*: give the module"):
        gp.capture(make(), (X,))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_says_nothing_of_what_was_only_tried(
    compiled: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch of two does not fit the code, nor do 9 features; what is compiled is not compiled."""

    class Row(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, -1))

    model = nn.Sequential(torch.compile(Net())) if compiled else Row()
    counted = torch._dynamo.utils.counters["frames"]  # of what is compiled
    counted.clear()
    gp.capture(model, (X[:1],))
    assert not counted
    assert capfd.readouterr() == ("", "")


def test_prompts_of_peft_are_refused_without_a_call_that_they_have_not() -> None:
    class PeftModel(Net):
        active_peft_config = SimpleNamespace(is_prompt_learning=True)

    PeftModel.__module__ = "peft.peft_model"
    with pytest.raises(CaptureError, match="prompts .* give the model without them"):
        gp.capture(PeftModel(), (X,))


def test_adapters_are_refused_with_what_to_call() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(byte_llama(num_hidden_layers=1), config)
    for each in (model, model.base_model.model):
        with pytest.raises(CaptureError, match="merge_and_unload"):
            gp.capture(each)
    gp.capture(model.merge_and_unload(), cache=False)


# -- signatures and outputs -----------------------------------------------------------------------


def test_inputs_of_a_starred_parameter_have_names() -> None:
    class Sum(Net):
        def forward(self, *xs: Tensor, scale: Tensor) -> Tensor:
            return super().forward(sum(xs)) * scale

    class Positional(Net):
        def forward(self, *xs: Tensor) -> Tensor:
            return super().forward(sum(xs))

    program = gp.capture(Positional(), (X, X, X))
    assert [value.name for value in program.inputs] == ["xs.0", "xs.1", "xs.2"]


def test_a_dataclass_of_outputs_has_its_names() -> None:
    @dataclass
    class Result:
        mean: Tensor
        parts: list[Tensor]

    class Named(Net):
        def forward(self, x: Tensor) -> Result:
            h = super().forward(x)
            return Result(h.mean(1), [h, h + 1])

    program = gp.capture(Named(), (X,))
    assert [value.name for value in program.outputs] == ["mean", "parts.0", "parts.1"]


def test_outputs_without_a_tensor_are_refused() -> None:
    class Silent(Net):
        def forward(self, x: Tensor) -> int:
            return x.ndim

    with pytest.raises(CaptureError, match="Silent returns no tensor"):
        gp.capture(Silent(), (X,))


# -- sizes ----------------------------------------------------------------------------------------


def test_lengths_are_dynamic_by_default_also_of_two_inputs() -> None:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 16)
            self.body = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.body(self.words(source), self.words(target), tgt_mask=mask)

    model = Translate().eval()
    source, target = torch.randint(0, 30, (2, 11)), torch.randint(0, 30, (2, 7))
    program = gp.capture(model, (source, target))
    assert not program.limits
    for rows, first, second in [(1, 12, 1), (3, 5, 9)]:
        given = torch.randint(0, 30, (rows, first)), torch.randint(0, 30, (rows, second))
        assert torch.allclose(program(*given)["output"], model(*given), atol=1e-5)


def test_a_batch_that_the_model_fixes_at_one_is_kept_and_said() -> None:
    class One(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, 8))

    program = gp.capture(One(), (X[:1],))
    assert program.inputs[0].shape == (1, 8)
    assert program(X[:1])["output"].shape == (1, 4)
    (note,) = program.notes
    assert note.kind == "fixed-size"
    assert note.text.startswith("dimension 0 of x is 1 alone: ")


def test_sides_of_an_image_are_said_to_be_fixed_where_the_model_takes_others() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    program = gp.capture(nn.Sequential(*layers), (torch.randn(2, 3, 8, 10),))
    assert [note.text.partition(" alone")[0] for note in program.notes] == [
        "dimension 2 of input is 8",
        "dimension 3 of input is 10",
    ]


def test_an_input_without_a_batch_is_taken_as_it_is() -> None:
    class Flat(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.squeeze(0))[None]

    model = Flat().eval()
    x = torch.randn(1, 5, 8)
    program = gp.capture(model, (x,))
    assert torch.allclose(program(x)["output"], model(x), atol=1e-6)
    assert program.inputs[0].shape[0] == 1
    longer = torch.randn(1, 9, 8)  # the length is open where the batch is not
    assert torch.allclose(program(longer)["output"], model(longer), atol=1e-6)
    (note,) = program.notes
    assert note.text.startswith("dimension 0 of x is 1 alone: ")


def test_a_length_that_the_code_fixes_is_said() -> None:
    class Steps(Net):
        def forward(self, x: Tensor) -> Tensor:
            return sum(super(Steps, self).forward(x[:, at]) for at in range(x.shape[1]))

    program = gp.capture(Steps(), (torch.randn(2, 5, 8),))
    assert program.inputs[0].shape[1:] == (5, 8)
    (note,) = program.notes  # and none on dimension 2, for which the model takes no other size
    assert note.text.startswith("dimension 1 of x is 5 alone: ")


# -- regions and masks ----------------------------------------------------------------------------


class Region(nn.Module):
    def __init__(self, region: Callable[[], object]) -> None:
        super().__init__()
        self.region = region
        self.net, self.last = Net(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with self.region():  # type: ignore[attr-defined]
            h = self.net(x)
        return self.last(h)


@pytest.mark.parametrize(
    "region",
    [
        lambda: torch.autocast("cuda", enabled=False),
        lambda: torch.autocast("cpu", enabled=False),
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.set_grad_enabled(True),
        torch.inference_mode,
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_region_that_casts_nothing_is_read_with_the_rest(region: Callable[[], object]) -> None:
    model = Region(region).eval()
    program = gp.capture(model, (X,))
    assert not program.graph.find_nodes(op="get_attr")
    with torch.no_grad():
        assert torch.allclose(program(X)["output"], model(X))
    assert [group.size for group in gp.analyze(program).groups if group.size == 32]


def test_a_region_that_casts_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"runs under torch.autocast\('cpu'\).*test_edges.py:"):
        gp.capture(Region(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), (X,))


def test_a_causal_mask_that_the_model_makes_is_captured() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.body(x, mask=mask)

    model = Causal().eval()
    program = gp.capture(model, (torch.randn(2, 6, 16),))
    x = torch.randn(3, 9, 16)
    assert torch.allclose(program(x)["output"], model(x), atol=1e-5)


class Fork(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def test_the_way_out_is_named_only_where_it_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    class Count(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[: len(set(x.tolist()[0]))]

    with pytest.raises(CaptureError, match="along_example=True"):
        gp.capture(Fork(), (X,))
    with pytest.raises(CaptureError) as caught:
        gp.capture(Count(), (X,), dynamic_shapes=({0: Dim.AUTO},))
    told = str(caught.value)
    assert "along_example" not in told
    assert "along its example it fails too: dimension 0 of" in told and "as an input" in told
    assert capfd.readouterr() == ("", "")


def test_pieces_as_long_as_an_input_says_are_captured_as_the_example_has_them() -> None:
    class Pieces(Net):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            lengths = lengths.repeat_interleave(torch.ones_like(lengths))
            ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            pieces = x.view(5, 8).split((ends[1:] - ends[:-1]).tolist())
            return torch.cat([super(Pieces, self).forward(each).cumsum(0) for each in pieces])

    model, given = Pieces().eval(), (torch.randn(5, 8), torch.tensor([2, 3]))
    program = gp.capture(model, given, along_example=True)
    assert torch.allclose(program(*given)["output"], model(*given), atol=1e-6)
    assert "dimension 0 of x is 5 alone" in " ".join(note.text for note in program.notes)


# -- transformers models on inputs of one's own ---------------------------------------------------


def test_a_transformers_model_on_ones_own_inputs_can_be_saved(tmp_path: object) -> None:
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 40, (2, 7))
    types = torch.zeros_like(ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    program = gp.capture(model, inputs)
    longer = {name: torch.cat([each, each[:, :2]], 1) for name, each in inputs.items()}
    longer["token_type_ids"] = longer["token_type_ids"].clone()
    longer["token_type_ids"][:, 5:] = 1
    expected = model(**longer).logits
    assert torch.allclose(program(**longer)["logits"], expected, atol=1e-5)
    pipeline = gp.Pipeline.parse("prune{target=bert.encoder*:ffn ratio=0.5 criterion=l2}")
    pruned = pipeline.run(program).program
    pruned.save_pretrained(f"{tmp_path}/saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(f"{tmp_path}/saved")
    assert torch.allclose(again.eval()(**longer).logits, pruned(**longer)["logits"], atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_types_of_tokens_are_an_input_that_may_be_left_out(model_type: str, tmp_path: Path) -> None:
    model: Any = tiny_model("masked-lm" if model_type != "gpt2" else "causal-lm", model_type)
    program = gp.capture(model, cache=False)
    ids = torch.randint(5, 90, (3, 9))
    types = (torch.arange(9) > 4).long().expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(program(input_ids=ids)["logits"], model(input_ids=ids).logits)
        if model_type != "bert":  # of one type, or of none where they are left out
            assert "token_type_ids" not in [value.name for value in program.inputs]
            return
        pair = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
        found, expected = program(**pair)["logits"], model(**pair).logits
    torch.testing.assert_close(found, expected)
    assert (found - program(input_ids=ids)["logits"]).abs().max() > 0.01
    program.save(tmp_path / "archive")
    assert torch.equal(archive.load(tmp_path / "archive")(**pair)["logits"], found)


def test_a_model_without_weights_takes_types_of_tokens_as_one_with_weights_does() -> None:
    model: Any = tiny_model("masked-lm", "bert")
    with torch.device("meta"):
        bare = type(model)(model.config).eval()
    names = [value.name for value in gp.capture(bare).inputs]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]


def test_plans_from_before_types_of_tokens_were_an_input_hold() -> None:
    program = gp.capture(tiny_model("masked-lm", "bert"))
    before = dataclasses.replace(
        program, inputs=tuple(v for v in program.inputs if v.name != "token_type_ids")
    )
    assert program.fingerprint() == before.fingerprint()
