"""Choose the operator of ONNX that an attention is written as, and say why not a better one.

`gqa` is com.microsoft's GroupQueryAttention, which holds the cache and takes KV heads as they are;
`mha` its MultiHeadAttention; `standard` the Attention of ONNX from opset 23 on; `static` that of
opset 24 with TensorScatter, which writes new keys and values into caches as long as the text may
become; `decomposed` is what torch's exporter makes of it. A layer gets the best form that its
target has and that computes what the layer does.

Reference: ONNX Runtime's contrib operators (docs/ContribOperators.md) and ONNX's Attention-23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphprune.analysis.attention.recognize import (
    Recognition,
    RecognizedAttention,
    UnrecognizedAttention,
)
from graphprune.analysis.attention.rotary import Rotary, RotaryReader
from graphprune.errors import BackendError, UsageError
from graphprune.ir.devices import Runtime
from graphprune.ir.program import Program
from graphprune.selection.kernel_sizes import HEADS
from graphprune.weights.tensors import type_name

Target = Runtime
Form = Literal["gqa", "mha", "static", "standard", "decomposed"]

_FORMS: dict[Target, tuple[Form, ...]] = {
    "portable": ("static", "standard"),
    "tensorrt": ("standard",),
    "cpu": ("gqa", "standard", "mha"),
    "cuda": ("gqa", "mha", "standard"),
}
"""What a target runs, best first."""

OPSETS: dict[Target, int] = {"portable": 23, "cpu": 23, "cuda": 20, "tensorrt": 23}
"""The opset that a target is best served with: CUDA's kernels for the newer ones are slower."""

STANDARD_OPSET = 23
"""The first opset that has Attention."""

STATIC_OPSET = 24
"""The first opset that has TensorScatter."""


Rotations = dict[Recognition, tuple[Rotary, Rotary]]
"""Attention -> how its queries and its new keys are rotated."""


@dataclass(frozen=True)
class AttentionForm:
    """The form that an attention is written in.

    Parameters
    ----------
    module
        The dotted path of the module that attends.
    form
        The form.
    why
        What it is, or why it has no better form.
    positions
        Positions that its rotary embedding has angles for, where that is inside.
    """

    module: str
    form: Form
    why: str
    positions: int | None = None

    def __str__(self) -> str:
        return f"{self.form}: {self.why}"


def forms_in(attention: Mapping[str, str]) -> set[str]:
    """Return the forms in what is said of attention, by module, as `AttentionForm` says it."""
    return {said.partition(":")[0] for said in attention.values()}


def check_target(program: Program, target: Target | None, opset: int) -> None:
    """Refuse a target that cannot run `program`, or an opset that nothing knows.

    Raises
    ------
    BackendError
        When the target has no kernels for the element type of most of the program's weights.
    UsageError
        When there is no such target or opset.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UsageError(
            f"opset {opset} is unknown to onnx {onnx.__version__}: it ends at {newest}"
        )
    if target is None:
        return
    if target not in _FORMS:
        raise UsageError(f"no target {target!r}: there are {', '.join(_FORMS)}")
    held: dict[torch.dtype, int] = {}
    for name, dtype in program.compute_types.items():
        if dtype.is_floating_point:
            held[dtype] = held.get(dtype, 0) + program.weights[name].numel()
    dtype = max(held, key=held.__getitem__, default=torch.float32)
    said = type_name(dtype)
    half = (torch.float16, torch.bfloat16)
    if target == "cuda" and dtype not in half:
        raise BackendError(
            f"target cuda takes a program in float16 or bfloat16, and this one is in {said}: "
            'load the model so, as graphprune.load(directory, dtype="float16") does'
        )
    if target == "cpu" and dtype == torch.bfloat16:
        raise BackendError(f"target cpu has no kernels for {said}: load the model in float32")


def form_of(
    site: Recognition,
    target: Target,
    opset: int,
    shared: set[fx.Node],
    without: frozenset[Form] = frozenset(),
) -> AttentionForm:
    """Return the best form for `site` that `target` has at `opset`.

    `shared` are joined keys and values that something else reads too: no operator may hold those.
    The forms in `without` are those that not all caches of the program can be in.
    """
    if isinstance(site, UnrecognizedAttention):
        return AttentionForm(site.module, "decomposed", site.why)
    forms = [form for form in _FORMS[target] if form != "static" or opset >= STATIC_OPSET]
    return AttentionForm(site.module, *_best(site, target, opset, shared, forms, without))


def _best(
    site: RecognizedAttention,
    target: Target,
    opset: int,
    shared: set[fx.Node],
    forms: Sequence[Form],
    without: frozenset[Form],
) -> tuple[Form, str]:
    against: dict[Form, Callable[[], str]] = {
        "gqa": lambda: _not_gqa(site, target, shared),
        "mha": lambda: _not_mha(site),
        "static": lambda: _not_static(site, opset, shared),
        "standard": lambda: _not_standard(site, opset),
    }
    reasons: list[str] = []
    for form in forms:
        if why := "not every cache can be one" if form in without else against[form]():
            reasons.append(f"no {form}, for {why}")
        else:
            return form, ": ".join((_said(site), *reasons))
    return "decomposed", "; ".join(reasons)


def _said(site: RecognizedAttention) -> str:
    heads = f"{site.heads} query heads on {site.kv_heads} KV heads of {site.sizes[0]}"
    cap = f", soft cap {site.softcap:g}" if site.softcap else ""
    sink = ", sink" if site.sink is not None else ""
    return f"{heads}, {site.mask}{cap}{sink}"


def _not_gqa(site: RecognizedAttention, target: Target, shared: set[fx.Node]) -> str:
    """Say why GroupQueryAttention does not compute what `site` does; "" where it does."""
    key, value = site.sizes
    dtype = site.query.meta["val"].dtype
    if site.caches is None:
        return "it has no cache"
    if any(cached.joined in shared for cached in site.caches):
        return "its cache is read elsewhere too"
    if site.mask.kind not in ("causal", "window"):
        return f"its mask is {site.mask}"
    if site.mask.node is not None and not site.mask.padded:
        return "its mask takes no padding"
    if key != value:
        return f"keys have size {key} and values {value}"
    if key % HEADS.minimum:
        return f"head size {key} is no multiple of {HEADS.minimum}"
    if target == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel of CUDA takes {str(dtype).removeprefix('torch.')}"
    return ""


def _not_mha(site: RecognizedAttention) -> str:
    """Say why MultiHeadAttention does not compute what `site` does; "" where it does."""
    if site.heads != site.kv_heads:
        return f"{site.kv_heads} KV heads would have to be repeated"
    return _more_than_masked(site, "its scores are capped")


def _not_static(site: RecognizedAttention, opset: int, shared: set[fx.Node]) -> str:
    """Say why TensorScatter and Attention do not compute what `site` does; "" where they do."""
    if site.caches is None:
        return "it has no cache"
    if any(cached.joined in shared for cached in site.caches):
        return "its cache is read elsewhere too"
    if site.mask.padding is None:
        return "its mask takes no padding"
    return _not_standard(site, opset)


def _not_standard(site: RecognizedAttention, opset: int) -> str:
    """Say why ONNX's own Attention does not compute what `site` does; "" where it does."""
    if opset < STANDARD_OPSET:
        return f"opset {opset} has no Attention, {STANDARD_OPSET} has"
    return _more_than_masked(
        site, "runtimes differ in whether they cap scores before they mask them"
    )


def _more_than_masked(site: RecognizedAttention, capped: str) -> str:
    """Say what there is beside scores and a mask, `capped` for a soft cap; "" for nothing."""
    if site.sink is not None:
        return "it has a sink"
    if site.softcap is not None:
        return capped
    if site.mask.node is None and site.mask.kind == "causal":
        return "it is causal without a mask"
    return ""


def rotations_of(program: Program, sites: Sequence[RecognizedAttention]) -> Rotations:
    """Return the rotary embeddings of queries and new keys that GroupQueryAttention has too."""
    positions = program.context_length
    if not sites or positions is None:
        return {}
    reader = RotaryReader(program, positions)
    found: Rotations = {}
    for site in sites:
        assert site.caches is not None
        query, key = reader.read(site.query), reader.read(site.caches[0].new)
        if query is None or key is None or site.sizes[0] % HEADS.best or query.width % HEADS.best:
            continue
        alike = query.interleaved == key.interleaved and query.cos.shape == key.cos.shape
        if alike and torch.equal(query.cos, key.cos) and torch.equal(query.sin, key.sin):
            found[site] = query, key
    return found


def read_by_several(sites: Sequence[Recognition]) -> set[fx.Node]:
    """Return joined keys and values that several attentions read."""
    read = (site for site in sites if isinstance(site, RecognizedAttention))
    joined = [cached.joined for site in read for cached in site.caches or ()]
    return {node for node in joined if joined.count(node) > 1}
