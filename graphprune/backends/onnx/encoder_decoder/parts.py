"""An encoder-decoder in parts, in the layouts that runtimes read.

``optimum``
    ``encoder_model.onnx``; ``decoder_model.onnx``, which takes the first tokens and what was
    encoded, and gives all caches; ``decoder_with_past_model.onnx``, which takes them and the next
    tokens. Optimum and transformers.js know these names.
``genai``
    ``encoder.onnx``, which gives the caches of what it encodes too, and ``decoder.onnx``, which
    begins with an empty cache of tokens: onnxruntime-genai's layout for speech.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphprune.backends.onnx.encoder_decoder.anatomy import (
    Anatomy,
    Cache,
    anatomy_of,
    is_encoder_decoder,
)
from graphprune.backends.onnx.encoder_decoder.pieces import piece
from graphprune.backends.onnx.encoder_decoder.stepwise import stepwise
from graphprune.errors import BackendError, UsageError
from graphprune.ir.program import PAST, PRESENT, Program

Layout = Literal["optimum", "genai"]
LAYOUTS: tuple[Layout, ...] = ("optimum", "genai")

Role = Literal["encoder", "first", "next"]
"""What a part does: encode; take the first tokens; take the tokens that follow."""

FILES: dict[Layout, dict[Role, str]] = {
    "optimum": {
        "encoder": "encoder_model.onnx",
        "first": "decoder_model.onnx",
        "next": "decoder_with_past_model.onnx",
    },
    "genai": {"encoder": "encoder.onnx", "next": "decoder.onnx"},
}

SPEECH = "input_features"
"""The input of models that onnxruntime-genai takes apart as it does Whisper."""

_FRAMES = 3000
"""Half a minute of sound, the one length that onnxruntime-genai (0.18) takes."""

_KINDS = ("key", "value")
_IDS, _MASK, _STATES = "input_ids", "encoder_attention_mask", "encoder_hidden_states"


@dataclass(frozen=True)
class Parts:
    """The parts of an encoder-decoder, in a layout.

    Parameters
    ----------
    layout
        The layout.
    programs
        The part of each role.
    not_genai
        Why onnxruntime-genai cannot run the model; "" where it can.
    """

    layout: Layout
    programs: Mapping[Role, Program]
    not_genai: str


def split(program: Program, layout: Layout | None = None) -> Parts:
    """Return the parts of `program`, a call of an encoder-decoder.

    Parameters
    ----------
    program
        The program.
    layout
        The layout; by default genai's for speech, and optimum's for all else.

    Raises
    ------
    BackendError
        When onnxruntime-genai cannot run the model and its layout is asked for, or the decoder
        cannot be run token by token.
    """
    anatomy = anatomy_of(program)
    why = check_layout(program, layout)
    layout = layout or ("optimum" if why else "genai")
    made = {"optimum": _for_optimum, "genai": _for_genai}[layout](program, anatomy)
    return Parts(layout, made, why)


def has_parts(program: Program, layout: Layout | None = None) -> bool:
    """Return whether `program` is an encoder-decoder.

    Raises
    ------
    UsageError
        When it is none, and a layout is named.
    """
    found = is_encoder_decoder(program)
    if not found and layout is not None:
        raise UsageError(f"layout={layout} is of an encoder and a decoder: this is one model")
    return found


def check_layout(program: Program, layout: Layout | None) -> str:
    """Say why onnxruntime-genai cannot run the model, "" where it can; refuse its layout then.

    Raises
    ------
    BackendError
        When it cannot, and `layout` is its own; or it has no parts.
    """
    why = _not_genai(program, anatomy_of(program))
    if layout == "genai" and why:
        raise BackendError(f"onnxruntime-genai cannot run this encoder-decoder: {why}")
    return why


def _not_genai(program: Program, anatomy: Anatomy) -> str:
    """Say why onnxruntime-genai (0.18) cannot run the model; "" where it can."""
    inputs = [value.name for value in program.inputs if value.name != anatomy.tokens[0].name]
    if inputs != [SPEECH]:
        return f"it serves those that take {SPEECH}, as Whisper does, and not {', '.join(inputs)}"
    frames = program.inputs[0].shape[-1]
    if frames != _FRAMES:
        return f"it takes sounds of {_FRAMES:,} frames, and the model {frames}"
    if len(anatomy.own) != len(anatomy.cross):
        return "its decoder does not attend to its tokens as often as to what is encoded"
    return ""


def _for_optimum(program: Program, anatomy: Anatomy) -> dict[Role, Program]:
    own = _named(anatomy.own, lambda at, kind: f"{at}.decoder.{kind}")
    cross = _named(anatomy.cross, lambda at, kind: f"{at}.encoder.{kind}")
    masks = [(_MASK, node) for _, node in anatomy.masks]
    ids = (_IDS, anatomy.tokens[1])
    given = [ids, *masks, (_STATES, anatomy.hidden)]
    # Optimum tells caches apart by their order: those of a layer together, its own tokens' first.
    presents = dict(sorted({**own, **cross}.items(), key=lambda each: _layer(each[0])))
    return {
        "encoder": _encoder(program, anatomy, "last_hidden_state", {}),
        "first": piece(
            program,
            given,
            [_logits(program), *((PRESENT + name, node) for name, node in presents.items())],
        ),
        "next": stepwise(
            program,
            anatomy,
            [ids, *masks, *((PAST + name, node) for name, node in cross.items())],
            {PAST + name: (PRESENT + name, node) for name, node in own.items()},
            [_IDS, *(name for name, _ in masks), *(PAST + name for name in presents)],
        ),
    }


def _layer(name: str) -> int:
    return int(name.partition(".")[0])


def _for_genai(program: Program, anatomy: Anatomy) -> dict[Role, Program]:
    own = _named(anatomy.own, lambda at, kind: f"{kind}_self_{at}")
    cross = _named(anatomy.cross, lambda at, kind: f"{kind}_cross_{at}")
    return {
        "encoder": _encoder(
            program, anatomy, _STATES, {f"present_{name}": node for name, node in cross.items()}
        ),
        "next": stepwise(
            program,
            anatomy,
            [
                (_IDS, anatomy.tokens[1]),
                *((f"past_{name}", node) for name, node in cross.items()),
            ],
            {f"past_{name}": (f"present_{name}", node) for name, node in own.items()},
        ),
    }


def _encoder(
    program: Program, anatomy: Anatomy, hidden: str, caches: Mapping[str, fx.Node]
) -> Program:
    renamed = {SPEECH: "audio_features"} if caches else {}
    given = [
        (renamed.get(value.name, value.name), node)
        for value, node in program.input_nodes()
        if node is not anatomy.tokens[1]
    ]
    return piece(program, given, [(hidden, anatomy.hidden), *caches.items()])


def _named(caches: tuple[Cache, ...], name: Callable[[int, str], str]) -> dict[str, fx.Node]:
    return {
        name(at, kind): getattr(cache, kind) for at, cache in enumerate(caches) for kind in _KINDS
    }


def _logits(program: Program) -> tuple[str, fx.Node]:
    value, node = next(iter(program.output_nodes()))
    return value.name, node
