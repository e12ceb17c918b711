from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from architectures import (
    ARCHITECTURES,
    DECODERS,
    VOCABULARY,
    build,
    cache_after,
    inputs_of,
    model_of,
    program_of,
    relative_error,
)
from byte_llama import byte_llama
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import masking_utils

import graphprune as gp
from graphprune.errors import CaptureError, UsageError
from graphprune.frontend.example_inputs import example_of
from graphprune.frontend.transformers_models import capture_transformers
from graphprune.ir.exported import to_exported_program
from graphprune.ir.program import PAST, PRESENT, Note, Program
from graphprune.ir.provenance import module_path, source_line

pytestmark = pytest.mark.captures_anew

CLOSE = 1e-5


class Wrapped(nn.Module):
    """Any function with a linear layer before it."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.first(x))


def captured(function: Callable[[Tensor], object]) -> Program:
    return gp.capture(Wrapped(function), example_inputs=(torch.randn(2, 4, 6),))


def calls(program: Program, name: str) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if str(node.target) == f"aten.{name}"]


@torch.no_grad()
def logits_of(name: str, ids: Tensor, **inputs: Tensor) -> Tensor:
    logits: Tensor = model_of(name)(input_ids=ids, **inputs).logits
    return logits


# -- decoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 12), (4, 5)])
def test_the_full_pass_equals_transformers(name: str, batch: int, length: int) -> None:
    program = program_of(name)
    inputs = inputs_of(program, batch=batch, length=length)
    expected = logits_of(name, **{"ids": inputs["input_ids"]})
    assert relative_error(expected, program(**inputs)["logits"]) < CLOSE


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_in_chunks_equals_the_full_pass_of_transformers(name: str) -> None:
    program = program_of(name)
    ids = inputs_of(program, batch=2, length=10)["input_ids"]
    past: dict[str, Tensor] = {}
    pieces = []
    for start, end in [(0, 1), (1, 5), (5, 6), (6, 10)]:
        outputs = program(input_ids=ids[:, start:end], **past)
        past = cache_after(outputs)
        pieces.append(outputs["logits"])
        assert all(value.shape[2] == end for value in past.values())
    assert relative_error(logits_of(name, ids), torch.cat(pieces, 1)) < CLOSE


@pytest.mark.parametrize("name", DECODERS)
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(name: str) -> None:
    program = program_of(name)
    ids = inputs_of(program, batch=2, length=9)["input_ids"]
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    first = program(input_ids=ids[:, :8], attention_mask=mask)
    alone = logits_of(name, ids[:1, 3:])
    assert relative_error(alone[:, :5], first["logits"][:1, 3:]) < CLOSE
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    last = program(input_ids=ids[:, 8:], attention_mask=longer, **cache_after(first))["logits"]
    assert relative_error(alone[:, 5:], last[:1]) < CLOSE
    assert relative_error(logits_of(name, ids[1:])[:, 8:], last[1:]) < CLOSE


@pytest.mark.parametrize("name", DECODERS)
def test_batch_and_lengths_are_dynamic_and_shared_by_all_inputs(name: str) -> None:
    program = program_of(name)
    ids, mask, *caches = program.inputs
    assert (ids.name, mask.name) == ("input_ids", "attention_mask")
    layers = model_of(name).config.num_hidden_layers
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    assert [cache.name for cache in caches] == [PAST + name for name in names]
    assert [value.name for value in program.outputs] == ["logits", *(PRESENT + n for n in names)]
    batch, new = ids.shape
    past = caches[0].shape[2]
    assert len({batch, new, past}) == 3
    assert all(isinstance(size, str) for size in (batch, new, past))
    assert mask.shape[0] == batch
    assert {(cache.shape[0], cache.shape[2]) for cache in caches} == {(batch, past)}
    assert program.outputs[0].shape == (batch, new, VOCABULARY)
    assert program.is_decoder


def test_a_decoder_may_be_captured_without_its_cache() -> None:
    program = gp.capture(model_of("llama-gqa"), cache=False)
    assert program.notes == (Note("no-cache", "captured without a cache, as asked"),)
    assert not program.is_decoder
    assert [value.name for value in program.outputs] == ["logits"]
    inputs = inputs_of(program)
    expected = logits_of("llama-gqa", inputs["input_ids"])
    assert relative_error(expected, program(**inputs)["logits"]) < CLOSE


@pytest.mark.parametrize(
    ("name", "why"), [("bert", "takes no past_key_values"), ("t5", "captured as one call")]
)
def test_a_cache_that_does_not_exist_is_refused_when_asked_for(name: str, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        gp.capture(model_of(name), cache=True)


def test_a_decoder_on_meta_is_captured_with_fixed_sizes_and_says_so() -> None:
    with torch.device("meta"):
        model = build("gpt2")
    program = gp.capture(model)
    assert [note.kind for note in program.notes] == ["stand-ins"]
    assert program.stand_ins == {101: "batch", 103: "new", 107: "past", 210: "total"}
    assert all(isinstance(size, int) for value in program.inputs for size in value.shape)
    assert all(weight.is_meta for weight in program.weights.values())
    real = program_of("gpt2")
    assert program.fingerprint() == real.fingerprint()
    assert [v.name for v in program.inputs] == [v.name for v in real.inputs]


def test_no_constant_of_a_meta_capture_is_made_on_meta() -> None:
    with torch.device("meta"):
        program = gp.capture(build("llama-gqa"))
    devices = [
        argument
        for node in program.graph.nodes
        for argument in (*node.args, *node.kwargs.values())
        if isinstance(argument, torch.device)
    ]
    assert devices
    assert {device.type for device in devices} == {"cpu"}


# -- other transformers models ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_equal_transformers_with_a_padded_row(name: str) -> None:
    program = program_of(name)
    assert not program.is_decoder
    inputs = inputs_of(program, batch=3, length=8)
    inputs["attention_mask"] = torch.ones(3, 8, dtype=torch.int64)
    inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        expected = model_of(name)(**inputs).logits
    assert relative_error(expected, program(**inputs)["logits"]) < CLOSE


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_image_models_equal_transformers(name: str) -> None:
    program = program_of(name)
    inputs = inputs_of(program, batch=5)
    with torch.no_grad():
        expected = model_of(name)(**inputs).logits
    assert relative_error(expected, program(**inputs)["logits"]) < CLOSE


# -- inputs that follow from the config ---------------------------------------------------------


def _whisper() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=32,
        num_mel_bins=6,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def _wav2vec2() -> Any:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    return transformers.Wav2Vec2ForCTC(config).eval()


def test_a_waveform_is_dynamic_from_the_length_of_its_example_on() -> None:
    model = _wav2vec2()
    program = gp.capture(model)
    (waveform,) = program.inputs
    assert waveform.name == "input_values"
    batch, length = waveform.shape
    assert isinstance(batch, str)
    assert program.within(length, 7) == 16 * model.config.inputs_to_logits_ratio == 160
    text = "captured for lengths from 160 on: shorter ones were not tried"
    assert program.notes == (Note("least-size", text),)
    samples = torch.randn(3, 201)
    with torch.no_grad():
        expected = model(samples).logits
    assert relative_error(expected, program(input_values=samples)["logits"]) < CLOSE


def test_features_take_the_layout_and_the_number_of_frames_that_the_model_accepts() -> None:
    model = _whisper()
    program = gp.capture(model)
    features, ids = program.inputs
    assert (features.name, ids.name) == ("input_features", "decoder_input_ids")
    assert features.shape[1:] == (6, 20)
    assert all(isinstance(size, str) for size in (features.shape[0], *ids.shape))
    inputs = {"input_features": torch.randn(4, 6, 20), "decoder_input_ids": torch.ones(4, 5).long()}
    with torch.no_grad():
        expected = model(**inputs).logits
    assert relative_error(expected, program(**inputs)["logits"]) < CLOSE


def _fed(main: str, accepted: Callable[[Tensor], bool], **fields: Any) -> Any:
    """A transformers model whose main input is `main`, which runs only on what is accepted."""
    config = transformers.PretrainedConfig(**fields)

    class Fed(transformers.PreTrainedModel):
        main_input_name = main
        config_class = transformers.PretrainedConfig

        def __init__(self) -> None:
            super().__init__(config)
            self.weight = nn.Parameter(torch.ones(1))
            self.tried: list[tuple[int, ...]] = []

        def forward(self, inputs: Any = None, input_features: Any = None, **_: Any) -> Tensor:
            given = inputs if input_features is None else input_features
            self.tried.append(tuple(given.shape))
            if not accepted(given):
                raise ValueError("not these")
            return given

    return Fed()


@pytest.mark.parametrize(
    ("main", "accepted", "shape"),
    [
        ("input_features", lambda x: x.shape[2] == 7, (2, 72, 7)),
        ("input_features", lambda x: x.shape[1] == 7, (2, 7, 72)),
        ("input_features", lambda x: x.shape[2] == 28, (2, 72, 28)),
        ("input_features", lambda x: x.shape[1:] == (7, 50), (2, 7, 50)),
        ("inputs", lambda x: x.dtype == torch.int64, (2, 8)),
        ("inputs", lambda x: x.shape[1:] == (3, 24, 24), (2, 3, 24, 24)),
        ("inputs", lambda x: x.dtype.is_floating_point and x.ndim == 2, (2, 16 * 5)),
    ],
)
def test_the_first_layout_that_the_model_takes_is_the_example(
    main: str, accepted: Callable[[Tensor], bool], shape: tuple[int, ...]
) -> None:
    fields = {"num_mel_bins": 7, "max_source_positions": 25, "image_size": 24}
    model = _fed(main, accepted, inputs_to_logits_ratio=5, **fields)
    example = example_of(model)
    assert example.inputs[main].shape == shape
    assert 0 in example.dims[main]


def test_a_main_input_of_which_nothing_is_known_is_named() -> None:
    with pytest.raises(
        CaptureError, match=r"Fed takes 'glyphs', for which no example can be made:"
    ):
        gp.capture(_fed("glyphs", lambda x: True))


def test_a_main_input_that_the_model_never_takes_is_named_with_its_reason() -> None:
    model = _fed("input_features", lambda x: False, num_mel_bins=7)
    why = r"takes 'input_features', .* can be made \(the model: ValueError: not these\)"
    with pytest.raises(CaptureError, match=why):
        gp.capture(model)
    assert (2, 72, 7) in model.tried


class _Masked(nn.Module):
    """A stand-in for a model that makes its mask with vmap."""

    device = torch.device("cpu")
    main_input_name = "input_ids"

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.function = function
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor, return_dict: bool = True) -> dict[str, Tensor]:
        places = [torch.arange(size) for size in (1, 1, input_ids.shape[1], input_ids.shape[1])]
        mask = masking_utils._vmap_expansion_sdpa(self.function)(*places)
        return {"logits": self.weight * mask.float().sum(-1) + input_ids[:, None]}


def _masked(function: Callable[..., Tensor]) -> Program:
    return capture_transformers(_Masked(function), cache=False)


def test_a_mask_that_is_made_by_vmap_is_captured_for_every_length() -> None:
    program = _masked(lambda batch, head, q, kv: (q - kv).abs() < 3)
    assert all(isinstance(size, str) for size in program.inputs[0].shape)
    assert not [node for node in program.graph.nodes if "batch_dim" in str(node.target)]
    ids = torch.zeros(3, 11, dtype=torch.int64)
    counts = [min(i + 2, 10) - max(i - 2, 0) + 1 for i in range(11)]
    assert program(input_ids=ids)["logits"][2, 0].tolist() == counts


def test_a_mask_that_looks_at_all_places_at_once_is_refused() -> None:
    with pytest.raises(CaptureError, match="a mask that is no function of each position alone"):
        _masked(lambda batch, head, q, kv: q - kv < (q + kv).amax() - 4)


class _Unbroadcast(_Masked):
    """A stand-in for a model whose graph does not say that mask and tokens are of one size."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.weight * input_ids + attention_mask[:1, : input_ids.shape[1]]}


def test_tokens_and_their_mask_share_their_sizes() -> None:
    program = capture_transformers(_Unbroadcast(), cache=False)
    ids, mask = program.inputs
    assert ids.shape == mask.shape
    assert all(isinstance(size, str) for size in ids.shape)


# -- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_the_models_own_and_each_has_one_node(name: str) -> None:
    program, model = program_of(name), model_of(name)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert set(named) - set(program.weights) == set(program.aliases)
    for weight, kind in program.kinds.items():
        if kind == "parameter":
            assert program.weights[weight].data_ptr() == named[weight].data_ptr()
            assert not program.weights[weight].requires_grad
    assert program.parameter_count() == model.num_parameters()
    placeholders = program.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(program.weights) + len(program.inputs)


def test_a_tie_of_a_plain_module_is_one_weight_with_an_alias() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.again = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.again.weight = self.down.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.down(self.up(x)))

    module = Tied()
    program = gp.capture(module, example_inputs=(torch.zeros(2, 6),))
    assert program.aliases == {"down.weight": "up.weight", "again.weight": "up.weight"}
    assert list(program.weights) == ["up.weight", "up.bias", "down.bias", "again.bias"]
    (node,) = [node for name, node in program.weight_nodes() if name == "up.weight"]
    assert len(node.users) == 3
    x = torch.randn(5, 6)
    assert torch.allclose(program(x)["output"], module(x))


def test_kinds_tell_parameters_from_buffers_and_constants() -> None:
    class Kinds(nn.Module):
        stored: Tensor
        made: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))
            self.unused = nn.Parameter(torch.ones(3))
            self.register_buffer("stored", torch.ones(4))
            self.register_buffer("made", torch.ones(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain + self.stored * self.made + torch.tensor([1.0, 2.0, 3.0, 4.0])

    program = gp.capture(Kinds(), example_inputs=(torch.zeros(2, 4),))
    kinds = dict(program.kinds)
    (constant,) = [name for name, kind in kinds.items() if kind == "constant"]
    assert torch.equal(program.weights[constant], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    del kinds[constant]
    assert kinds == {
        "gain": "parameter",
        "unused": "parameter",
        "stored": "buffer",
        "made": "derived",
    }
    assert program.parameter_count() == 7


# -- plain modules ------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        return left - right if scale is None else left - right * scale


def test_positional_examples_go_by_the_names_of_the_signature() -> None:
    program = gp.capture(Two(), example_inputs=(torch.zeros(2, 3), torch.zeros(2, 3)))
    assert [value.name for value in program.inputs] == ["left", "right"]
    left, right = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(program(left, right)["output"], left - right)
    assert torch.equal(program(right=right, left=left)["output"], left - right)


def test_keyword_examples_may_leave_defaults_out() -> None:
    examples = {"right": torch.zeros(2, 3), "left": torch.zeros(2, 3), "scale": torch.zeros(())}
    program = gp.capture(Two(), example_inputs=examples)
    assert [value.name for value in program.inputs] == ["right", "left", "scale"]
    given = {
        "left": torch.randn(4, 3),
        "right": torch.randn(4, 3),
        "scale": torch.tensor(2.0),
    }
    assert torch.equal(program(**given)["output"], given["left"] - given["right"] * 2)


def test_examples_of_one_row_still_give_a_dynamic_batch() -> None:
    program = gp.capture(nn.Linear(3, 2), example_inputs=(torch.zeros(1, 3),))
    assert isinstance(program.inputs[0].shape[0], str)
    assert program(torch.zeros(7, 3))["output"].shape == (7, 2)


def test_dynamic_shapes_are_those_of_torch_export() -> None:
    size = torch.export.Dim("length", min=2)
    program = gp.capture(
        nn.Linear(3, 2), example_inputs=(torch.zeros(2, 4, 3),), dynamic_shapes=({1: size},)
    )
    fixed, length, _ = program.inputs[0].shape
    assert fixed == 2
    assert isinstance(length, str)
    assert program(torch.zeros(2, 9, 3))["output"].shape == (2, 9, 2)


class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + y.sum(0)


def test_dynamic_shapes_by_name_are_those_of_the_inputs_in_any_order() -> None:
    rows = {0: torch.export.Dim.AUTO}
    x, y = torch.zeros(4, 3), torch.zeros(5, 3)
    for example in ((x, y), {"y": y, "x": x}):
        for shapes in ({"y": rows, "x": None}, {"y": rows}):
            program = gp.capture(Offset(), example, dynamic_shapes=shapes)
            sizes = {value.name: value.shape[0] for value in program.inputs}
            assert sizes["x"] == 4
            assert isinstance(sizes["y"], str)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": {0: torch.export.Dim.AUTO}}, "names 'z', which is no input"),
        (({0: torch.export.Dim.AUTO},), "for 1 inputs, and the example has x, y"),
        (({7: torch.export.Dim.AUTO}, None), "a dimension 7 of x, which has 2"),
        (({-1: torch.export.Dim.AUTO}, None), "a dimension -1 of x, which has 2"),
    ],
)
def test_dynamic_shapes_of_something_else_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gp.capture(Offset(), (torch.zeros(4, 3), torch.zeros(5, 3)), dynamic_shapes=shapes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_an_example_on_which_the_model_does_not_run_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match="does not run on the example: RuntimeError: .*type"):
        gp.capture(Offset(), (torch.zeros(4, 3, dtype=dtype), torch.zeros(5, 3)))


def test_nested_inputs_and_outputs_have_dotted_names() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> object:
            first, second = pair
            return {"sum": first + second, "parts": [first * 2, {"last": second * more["scale"]}]}

    x = torch.randn(2, 3)
    program = gp.capture(Nested(), example_inputs=((x, x), {"scale": x}))
    assert [value.name for value in program.inputs] == ["pair.0", "pair.1", "more.scale"]
    assert [value.name for value in program.outputs] == ["sum", "parts.0", "parts.1.last"]
    assert torch.equal(program(x, x, x)["parts.1.last"], x * x)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        pytest.param(lambda h: h, ["output"], id="one tensor"),
        pytest.param(lambda h: (h, [h + 1]), ["output.0", "output.1.0"], id="a tuple"),
        pytest.param(lambda h: {"a": h, "b": None}, ["a"], id="a dict with nothing in it"),
    ],
)
def test_outputs_are_named(function: Callable[[Tensor], object], names: list[str]) -> None:
    assert [value.name for value in captured(function).outputs] == names


def test_the_module_keeps_its_modes_and_weights() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    program = gp.capture(module, example_inputs=(torch.randn(2, 4),))
    assert [part.training for part in module.modules()] == [True, True, False, True]
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in module.parameters())
    x = torch.randn(3, 4)
    assert torch.allclose(program(x)["output"], module.eval()(x))


def test_the_config_of_a_model_with_experts_is_left_as_it_was() -> None:
    model = build("mixtral").train()
    before = model.config.to_dict(), model.config._experts_implementation
    program = gp.capture(model)
    assert (model.config.to_dict(), model.config._experts_implementation) == before
    assert all(part.training for part in model.modules())
    assert program.source is not None
    assert program.source.config is model.config


# -- what a size would decide is written down ---------------------------------------------------


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        pytest.param(lambda h: h.split(3, -1), [3, 3, 2], id="split"),
        pytest.param(lambda h: h.chunk(3, -1), [3, 3, 2], id="chunk"),
        pytest.param(lambda h: h.chunk(2, dim=2), [4, 4], id="chunk by keyword"),
        pytest.param(lambda h: h.split(3), None, id="of a dynamic dimension"),
    ],
)
def test_pieces_are_spelled_out(
    function: Callable[[Tensor], object], sizes: list[int] | None
) -> None:
    program = captured(function)
    written = [node.args[1] for node in calls(program, "split_with_sizes.default")]
    assert written == ([sizes] if sizes else [])


def test_the_scale_of_attention_is_spelled_out() -> None:
    def attend(h: Tensor) -> Tensor:
        heads = h.unflatten(2, (2, 4)).transpose(1, 2)
        plain = F.scaled_dot_product_attention(heads, heads, heads)
        return F.scaled_dot_product_attention(plain, heads, heads, scale=0.3)

    nodes = calls(captured(attend), "scaled_dot_product_attention.default")
    assert [node.kwargs["scale"] for node in nodes] == [1 / math.sqrt(4), 0.3]


def test_the_epsilon_of_rms_norm_is_spelled_out() -> None:
    program = captured(lambda h: F.rms_norm(F.rms_norm(h, [8]), [8], eps=0.5))
    first, second = calls(program, "rms_norm.default")
    assert first.kwargs["eps"] == torch.finfo(torch.float32).eps
    assert 0.5 in (*second.args, *second.kwargs.values())


def test_checks_are_left_out() -> None:
    for name in ("llama-gqa", "t5"):
        targets = {str(node.target) for node in program_of(name).graph.nodes}
        assert not [target for target in targets if "assert" in target]


# -- refusals -----------------------------------------------------------------------------------


def test_a_plain_module_without_examples_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear is no transformers model: give example_inputs"):
        gp.capture(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("examples", "why"),
    [
        pytest.param(torch.zeros(2, 2), r"give a tuple of inputs, such as \(x,\)", id="a tensor"),
        pytest.param((torch.zeros(2, 2), 3), "must hold tensors only", id="a number"),
        pytest.param((), "must hold tensors only", id="nothing"),
    ],
)
def test_examples_that_are_no_tensors_are_refused(examples: object, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        gp.capture(nn.Linear(2, 2), example_inputs=examples)  # type: ignore[arg-type]


def test_a_branch_on_data_is_refused_with_its_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    module = nn.Sequential(nn.Linear(3, 3), Branching()).train()
    line = Branching.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError) as caught:
        gp.capture(module, example_inputs=(torch.zeros(2, 3),))
    message = str(caught.value)
    assert message.startswith("torch.export could not capture Sequential")
    assert "data-dependent" in message
    assert f"(at frontend/test_capture.py:{line}); along_example=True" in message
    assert "\n" not in message
    assert module.training


# -- provenance ---------------------------------------------------------------------------------


def test_every_operator_of_a_decoder_knows_its_module_and_line() -> None:
    program = program_of("llama-gqa")
    nodes = [n for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert all(source_line(node).rpartition(":")[2].isdigit() for node in nodes)
    modules = dict(model_of("llama-gqa").named_modules())
    assert {module_path(node) for node in nodes} <= set(modules)
    weights = {node: name for name, node in program.weight_nodes()}
    for node in calls(program, "linear.default"):
        assert f"{module_path(node)}.weight" == weights[node.args[1]]
        assert source_line(node).startswith("torch/nn/modules/linear.py:")
    (silu,) = {module_path(node).split(".", 3)[-1] for node in calls(program, "silu.default")}
    assert silu == "mlp.act_fn"


@pytest.mark.captures_anew
def test_records_that_cost_less_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def traces() -> list[str | None]:
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        program = gp.capture(module, example_inputs=(torch.zeros(2, 4),))
        return [node.meta.get("stack_trace") for node in program.graph.nodes]

    records = traces()
    assert any(trace and "linear.py" in trace for trace in records)
    monkeypatch.setattr("graphprune.frontend.torch_export.cheap_records", contextlib.nullcontext)
    assert records == traces()


# -- as an exported program ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert", "t5", "resnet"])
def test_the_exported_program_runs_equal(name: str) -> None:
    program = program_of(name)
    filled = program.fill(inputs_of(program))
    called = to_exported_program(program).module()(
        *(filled[value.name] for value in program.inputs)
    )
    for value, found in zip(program.outputs, called, strict=True):
        assert torch.equal(found, program(**filled)[value.name]), value.name


# -- branches on data ------------------------------------------------------------------------------


def test_a_branch_on_data_is_followed_as_the_example_does_and_said() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = byte_llama(num_hidden_layers=1, rope_parameters=rope)
    program = gp.capture(model, along_example=True)
    ids = torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (program(input_ids=ids)["logits"] - expected).abs().max() < 1e-4
    (note,) = (note for note in program.notes if note.kind == "example-path")
    assert "the path that its example takes at transformers" in note.text
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            assert getattr(value, "real_tensor", None) is None


def test_a_branch_on_data_is_not_tried_with_one_choice_of_sizes_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = byte_llama(num_hidden_layers=1).eval()
    mlp, calls, export = model.model.layers[0].mlp, [], torch.export.export
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) if x.sum() > 0 else x
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: (calls.append(0), export(*a, **k)))
    with pytest.raises(CaptureError) as caught:
        capture_transformers(model)
    assert caught.value.at_all_sizes
    assert len(calls) == 4  # with a cache and without, as it is and with everything found


@pytest.mark.slow
def test_a_model_that_goes_two_ways_on_its_own_inputs_is_refused() -> None:
    class Fork(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            result = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            if input_ids[0, 0] > input_ids[0, -1]:
                result.logits = -result.logits
            return result

    with pytest.raises(CaptureError, match="branches on data in more ways than one"):
        gp.capture(Fork(byte_llama(num_hidden_layers=1).config).eval(), along_example=True)
