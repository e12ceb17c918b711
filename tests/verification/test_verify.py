"""The verifier accepts what is right and refuses what is wrong, whatever made it."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, coupling_of, program_of, random_plan, renamed_outputs
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import PlanError, VerificationError
from graphprune.ir.compare import tolerance_of
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.merge import merge_of
from graphprune.verification.verify import _runs

NAME = "llama-gqa"
UP, GATE, DOWN = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate", "down"))


def pruned(name: str = NAME, **options: Any) -> tuple[Program, Plan, Program]:
    program = program_of(name)
    plan = random_plan(coupling_of(name), **options)
    return program, plan, gp.apply(program, plan)


def merging(program: Program, groups: int) -> Plan:
    merges = tuple(merge_of(heads, groups) for heads in find_heads(program))
    return Plan((Step(program.fingerprint(), (), merges),))


def changed(program: Program, name: str, change: Callable[[Tensor], object]) -> Program:
    weight = program.weight(name).clone()
    change(weight)
    return program.with_weights({name: weight})


def refused(program: Program, plan: Plan, wrong: Program, *words: str, **options: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        gp.verify(program, plan, wrong, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# -- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exactness"),
    [
        ("llama-gqa", "rescaled"),
        ("gpt2", "approximate"),
        ("bert", "approximate"),
        ("gpt-neox", "approximate"),
        ("resnet", "exact"),
    ],
)
def test_a_narrower_residual_stream_is_accepted(name: str, exactness: str) -> None:
    groups = [group for group in coupling_of(name).groups if group.role == "residual"]
    assert {group.exactness for group in groups} == {exactness}
    report = gp.verify(*pruned(name, roles={"residual"}, ratio=0.5))
    assert report.max_relative_error <= 1e-4
    assert report.max_weight_error == 0


@pytest.mark.parametrize("name", ["llama-mha", "llama-eager", "gpt2", "t5"])
def test_merged_heads_are_accepted(name: str) -> None:
    program = program_of(name)
    plan = merging(program, 2)
    report = gp.verify(program, plan, gp.apply(program, plan))
    assert report.max_relative_error <= 1e-4


def test_the_original_equals_itself() -> None:
    program = program_of(NAME)
    report = gp.verify(program, Plan(), program)
    assert (report.max_relative_error, report.max_weight_error) == (0, 0)


def test_the_report_says_what_was_compared() -> None:
    report = gp.verify(*pruned())
    assert report.runs == ("full pass", "one more token on the cache")
    assert list(report.outputs) == ["logits"]
    assert report.max_relative_error == max(report.outputs.values())
    assert report.tolerance == 1e-4
    data = report.to_dict()
    assert json.loads(json.dumps(data))["outputs"] == dict(report.outputs)
    assert str(report) == (
        f"max relative error {report.max_relative_error:.1e} "
        "(tolerance 1e-04; full pass, one more token on the cache)"
    )
    assert gp.verify(*pruned("bert")).runs == ("full pass",)


def test_the_seed_decides_what_it_runs_on() -> None:
    program = program_of("gpt2")
    first, again, other = (
        {run: next(tries) for run, tries in _runs(program, seed)} for seed in (0, 0, 1)
    )
    assert len(first) == 2
    for run, inputs in first.items():
        assert torch.equal(inputs["input_ids"], again[run]["input_ids"])
        assert not torch.equal(inputs["input_ids"], other[run]["input_ids"])


def test_nothing_is_changed_by_verifying() -> None:
    program, plan, smaller = pruned()
    before = [{n: w.clone() for n, w in p.weights.items()} for p in (program, smaller)]
    graphs = [str(p.graph) for p in (program, smaller)]
    gp.verify(program, plan, smaller)
    for held, graph, p in zip(before, graphs, (program, smaller), strict=True):
        assert str(p.graph) == graph
        assert all(torch.equal(held[name], weight) for name, weight in p.weights.items())


# -- wrong weights --------------------------------------------------------------------------------


def test_one_weight_that_is_off_is_refused() -> None:
    program, plan, smaller = pruned()

    def nudge(weight: Tensor) -> None:
        weight[3, 4] += 0.01 * weight.abs().max()

    refused(program, plan, changed(smaller, UP, nudge), f"weight {UP}", "1.0e-02", "1e-04")


def test_two_units_swapped_in_one_weight_are_refused() -> None:
    program, plan, smaller = pruned()
    order = torch.tensor([1, 0, *range(2, 36)])
    wrong = changed(smaller, GATE, lambda weight: weight.copy_(weight[order]))
    refused(program, plan, wrong, f"weight {GATE}")


def test_units_in_another_order_are_refused_though_the_outputs_agree() -> None:
    program, plan, smaller = pruned()
    order = torch.tensor([1, 0, *range(2, 36)])
    wrong = changed(smaller, GATE, lambda weight: weight.copy_(weight[order]))
    wrong = changed(wrong, UP, lambda weight: weight.copy_(weight[order]))
    wrong = changed(wrong, DOWN, lambda weight: weight.copy_(weight[:, order]))
    ids = torch.arange(3, 12)[None]
    same = wrong(input_ids=ids)["logits"], smaller(input_ids=ids)["logits"]
    assert torch.allclose(*same, atol=1e-5)
    refused(program, plan, wrong, "weight model.layers.1.mlp.")


@pytest.mark.parametrize("name", [UP, DOWN, "model.layers.0.self_attn.q_proj.weight"])
def test_a_kept_unit_that_should_have_gone_is_refused(name: str) -> None:
    program, plan, smaller = pruned()
    ((dim, lost), *_) = [(d, i) for d, i in plan.removed[name].items() if d == (name == DOWN)]
    whole = program.weight(name)
    for other, indices in plan.removed[name].items():
        if other != dim:
            kept = [i for i in range(whole.shape[other]) if i not in indices]
            whole = whole.index_select(other, torch.tensor(kept))

    def keep_a_wrong_one(weight: Tensor) -> None:
        weight.select(dim, 5).copy_(whole.select(dim, lost[0]))

    refused(program, plan, changed(smaller, name, keep_a_wrong_one), f"weight {name}")


def test_a_head_that_was_not_averaged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("llama-mha")
    plan = merging(program, 2)
    monkeypatch.setattr("graphprune.transforms.heads.merge.pool", lambda weights, merges: {})
    refused(program, plan, gp.apply(program, plan), "weight model.layers.", "_proj.weight is")


def test_heads_that_were_averaged_with_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("gpt2")
    plan = merging(program, 2)
    right = gp.apply(program, plan)
    name = "transformer.h.1.attn.c_attn.weight"
    whole = program.weight(name)

    def pool_heads_apart(weight: Tensor) -> None:  # 0 with 2 and 1 with 3
        for start, first in ((32, 32), (64, 48)):
            heads = whole[:, start : start + 32].unflatten(1, (4, 8))
            mean = (heads[:, :2] + heads[:, 2:]) / 2
            weight[:, first : first + 16] = mean.flatten(1)

    refused(program, plan, changed(right, name, pool_heads_apart), f"weight {name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    program, plan, smaller = pruned(roles={"ffn"})
    wrong = changed(smaller, DOWN, lambda weight: weight[0, 0].fill_(value))
    refused(program, plan, wrong, DOWN, "holds values that are not finite")
    odd = changed(program, DOWN, lambda weight: weight[0].fill_(value))
    refused(odd, plan, gp.apply(odd, plan), "holds values that are not finite")


def test_outputs_that_are_no_numbers_are_refused() -> None:
    program = program_of(NAME)
    huge = program.with_weights({"lm_head.weight": program.weight("lm_head.weight") * 1e38 * 10})
    refused(huge, Plan(), huge, "logits holds values that are not finite")


class Pooled(nn.Module):
    """What integers mean, as lengths or as places where bags begin, no graph says."""

    def __init__(self, of_bags: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="sum") if of_bags else None
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        if self.bag is not None:
            return self.last(self.first(self.bag(x, given)).relu())
        held = (torch.arange(x.shape[1]) < given[:, None]).float()[..., None]
        return self.last((self.first(x).relu() * held).sum(1) / held.sum(1))


@pytest.mark.parametrize("of_bags", [False, True])
def test_integers_are_tried_until_the_original_makes_numbers_of_them(of_bags: bool) -> None:
    given = torch.tensor([0, 4]) if of_bags else torch.tensor([5, 2])
    x = torch.randint(0, 20, (9,)) if of_bags else torch.randn(2, 5, 8)
    program = gp.capture(Pooled(of_bags).eval(), (x, given))
    result = Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}").run(program, quiet=True)
    assert gp.verify(program, result.plan, result.program).proves_sizes


def test_a_model_that_takes_nothing_drawn_at_random_is_refused_in_one_line() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(8, 3)

        def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
            return self.last(self.bag(ids, starts - 7))

    program = gp.capture(Picky().eval(), (torch.randint(0, 20, (9,)), torch.tensor([7, 11])))
    with pytest.raises(VerificationError, match=r"takes no inputs drawn at random.*offsets[^\n]*$"):
        gp.verify(program, Plan(), program)


# -- wrong shapes ---------------------------------------------------------------------------------


def test_a_program_that_was_not_pruned_is_refused() -> None:
    program, plan, _ = pruned(roles={"ffn"})
    refused(program, plan, program, "mlp.gate_proj.weight is of shape (48, 32), not of shape (36, ")


def test_a_program_that_was_pruned_without_a_plan_is_refused() -> None:
    program, _, smaller = pruned(roles={"ffn"})
    refused(program, Plan(), smaller, "gate_proj.weight is of shape (36, 32), not of shape (48, ")


def test_a_missing_weight_or_output_is_refused() -> None:
    program, plan, smaller = pruned()
    renamed = {f"x{n}" if n == UP else n: weight for n, weight in smaller.weights.items()}
    kinds = {**smaller.kinds, f"x{UP}": "parameter"}
    wrong = dataclasses.replace(smaller, weights=renamed, kinds=kinds)
    refused(program, plan, wrong, f"{UP} is missing, not of shape")
    first, *rest = smaller.outputs
    outputs = (dataclasses.replace(first, name="scores"), *rest)
    wrong = dataclasses.replace(smaller, outputs=outputs)
    refused(program, plan, wrong, "logits is missing, not of shape")


# -- wrong graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "t5"])
def test_a_mean_that_lost_its_divisor_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.transforms.resize.Resize.keep_divisors", lambda resize: None)
    refused(*pruned(name, roles={"residual"}), "output logits")


def with_literal(program: Program, target: str, position: int, value: Any) -> Program:
    """`program` with one argument of every `target` in its graph replaced."""
    graph = torch.fx.Graph()
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copied))
    nodes = [node for node in graph.nodes if str(node.target) == target]
    assert nodes
    for node in nodes:
        node.update_arg(position, value)
    return dataclasses.replace(program, graph_module=torch.fx.GraphModule(torch.nn.Module(), graph))


def test_a_literal_that_is_off_is_refused() -> None:
    program, plan, smaller = pruned()
    wrong = with_literal(smaller, "aten.pow.Tensor_Scalar", 1, 4)
    refused(program, plan, wrong, "output logits")
    program, plan, smaller = pruned("gpt2", roles={"residual"})
    wrong = with_literal(smaller, "aten.layer_norm.default", 4, 0.1)
    refused(program, plan, wrong, "output logits")


def test_a_program_that_does_not_run_is_refused() -> None:
    program, plan, smaller = pruned("gpt2", roles={"ffn"})
    wrong = with_literal(smaller, "aten.layer_norm.default", 1, [31])
    refused(program, plan, wrong, "the program does not run: ", "[31]")


def test_heads_that_are_spread_over_the_wrong_queries_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from graphprune.transforms.heads import merge

    def tile(resize: Any, heads: Any, width: int) -> None:
        """0 1 0 1 where it should be 0 0 1 1."""
        for attention in heads.attentions:
            products = zip(attention.operands[1:], attention.products, strict=True)
            for operand, product in products:
                node, user = resize.new[operand], resize.new[product]
                with resize.graph.inserting_before(user):
                    wide = resize.graph.call_function(
                        torch.ops.aten.repeat.default, (node, [1, width, 1, 1])
                    )
                user.replace_input_with(node, wide)

    program = program_of("llama-eager")
    plan = merging(program, 2)
    gp.verify(program, plan, gp.apply(program, plan))
    monkeypatch.setattr(merge, "_insert_broadcasts", tile)
    refused(program, plan, gp.apply(program, plan), "output logits")


def test_a_cache_that_is_mixed_up_is_refused() -> None:
    program, plan, smaller = pruned()
    swapped = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}
    wrong = renamed_outputs(smaller, swapped)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(wrong(input_ids=ids)["logits"], smaller(input_ids=ids)["logits"])
    refused(program, plan, wrong, "output logits")


# -- wrong plans ----------------------------------------------------------------------------------


def test_another_plan_of_the_same_sizes_is_refused() -> None:
    program, _, smaller = pruned(seed=0)
    other = random_plan(coupling_of(NAME), seed=1)
    refused(program, other, smaller, "weight ")


def test_a_plan_that_leaves_a_step_out_is_refused() -> None:
    program, first, middle = pruned(roles={"ffn"})
    second = random_plan(gp.analyze(middle), roles={"kv-head"}, ratio=0.5)
    last = gp.apply(middle, second)
    gp.verify(program, first + second, last)
    gp.verify(middle, second, last)
    refused(program, first, last, "shape")


def test_a_plan_that_says_one_more_unit_is_refused() -> None:
    program, group = program_of(NAME), coupling_of(NAME).group("model.layers.1.mlp:ffn")
    plans = [
        Plan((Step(program.fingerprint(), (group.cut({(): units}),)),))
        for units in ((1, 2), (1, 2, 3), (1, 3))
    ]
    smaller = gp.apply(program, plans[0])
    refused(program, plans[1], smaller, "shape (46, 32), not of shape (45, 32)")
    refused(program, plans[2], smaller, "weight model.layers.1.mlp.")


def test_a_merge_into_fewer_groups_is_refused() -> None:
    program = program_of("llama-mha")
    refused(program, merging(program, 1), gp.apply(program, merging(program, 2)), "k_proj.weight")


def test_a_plan_for_another_program_is_refused() -> None:
    _, plan, smaller = pruned()
    other = program_of("llama-mha")
    with pytest.raises(PlanError, match=f"this one is {other.fingerprint()}"):
        gp.verify(other, plan, smaller)


# -- how close is close enough ---------------------------------------------------------------------


def test_the_tolerance_may_be_given() -> None:
    program, plan, smaller = pruned()

    def nudge(weight: Tensor) -> None:
        weight[3, 4] += 1e-3 * weight.abs().max()

    wrong = changed(smaller, UP, nudge)
    refused(program, plan, wrong, "past the tolerance of 1e-04")
    report = gp.verify(program, plan, wrong, tolerance=1e-2)
    assert report.tolerance == 1e-2
    assert report.max_weight_error == pytest.approx(1e-3, rel=0.01)
    refused(program, plan, smaller, "output logits", "1e-12", tolerance=1e-12)


def test_a_difference_in_the_last_bit_is_accepted() -> None:
    program, plan, smaller = pruned()
    close = changed(smaller, UP, lambda weight: weight.mul_(1 + 1e-6))
    assert 0 < gp.verify(program, plan, close).max_weight_error < 1e-5


def test_half_precision_is_given_more_room() -> None:
    program = gp.capture(build(NAME).bfloat16())
    plan = random_plan(gp.analyze(program), without={"residual"})
    report = gp.verify(program, plan, gp.apply(program, plan))
    assert report.tolerance == tolerance_of(torch.bfloat16) > tolerance_of(torch.float32)
    assert report.max_weight_error == 0


def test_what_was_captured_without_weights_is_refused_in_one_line() -> None:
    program, plan = program_of("llama-gqa"), random_plan(coupling_of("llama-gqa"))
    bare = gp.capture(build("llama-gqa").to("meta"))
    refused(bare, plan, gp.apply(bare, plan), "has no weights")
    refused(program, plan, gp.apply(bare, plan), "has no weights")


# -- independence ---------------------------------------------------------------------------------

REWRITING = ("transforms", "selection", "criteria", "backends", "ir.shape_propagation")


def rewriting(modules: set[str]) -> list[str]:
    """Those of `modules` that are, or lie in, what rewrites or decides."""
    return sorted(m for m in modules if any(f"{m}.".startswith(f"{r}.") for r in REWRITING))


def imports(module: str, inner: bool) -> Iterator[str]:
    """Modules of graphprune that `module` imports: all of them, or those at its top only."""
    path = Path(gp.__file__).parent / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        path = path.with_suffix("") / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "graphprune":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("graphprune."):
                yield node.module.removeprefix("graphprune.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("graphprune."):
                    yield alias.name.removeprefix("graphprune.")


def test_it_imports_nothing_of_the_rewriter_anywhere() -> None:
    modules = ("verification.verify", "verification.masked_reference")
    found = {name for module in modules for name in imports(module, inner=True)}
    assert {"plan.plan", "ir.program", "analysis.inference"} <= found
    assert not rewriting(found)


def test_nor_does_what_it_imports() -> None:
    pending, seen = ["verification.verify"], set()
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending.extend(imports(module, inner=False))
    inner = {"analysis.inference", "analysis.operators", "analysis.axes"}
    assert {"plan.plan", "ir.program"} | inner <= seen
    assert not rewriting(seen)


# -- what verification itself must not get wrong --------------------------------------------------


class Fourier(nn.Module):
    """Positions divided by frequencies, as constants or buffers of the code."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("periods", torch.arange(1.0, 9.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "reciprocal":
            return self.outer(self.inner(x) + (x[:, :1] * self.periods.reciprocal()).sin())
        periods = self.periods if self.kind == "buffer" else torch.tensor(range(1, 9)).float()
        return self.outer(self.inner(x) + (x[:, :1] / periods).sin())


@pytest.mark.parametrize("kind", ["buffer", "constant", "reciprocal"])
def test_constants_that_are_divided_by_make_nothing_infinite(kind: str) -> None:
    program = gp.capture(Fourier(kind).eval(), (torch.randn(4, 8),))
    result = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}").run(program)
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-5


class Steep(nn.Module):
    """What is infinite where a unit's weights are zero, and is then weighed by zero."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 3)
        self.decay = nn.Parameter(torch.linspace(0.5, 0.9, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        match self.kind:
            case "power":  # as the decay of a retention, at distances of either sign
                return self.outer(hidden + self.decay ** x[:, :1])
            case "logarithm":
                return self.outer(hidden.square().log())
            case "quotient":
                return self.outer(x[:, :1] / hidden)
        return self.outer((self.decay * x[:, :1]).reciprocal())


@pytest.mark.parametrize("kind", ["power", "logarithm", "quotient", "reciprocal"])
def test_what_zeros_make_infinite_is_weighed_by_zero(kind: str) -> None:
    program = gp.capture(Steep(kind).eval(), (torch.randn(4, 8),))
    result = gp.Pipeline.parse("prune{target=* ratio=0.5 criterion=random}").run(program)
    assert result.plan
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-5
    wrong = {"outer.bias": result.program.weights["outer.bias"] + torch.inf}
    with pytest.raises(VerificationError, match="finite"):
        gp.verify(program, result.plan, result.program.with_weights(wrong))


class Noisy(nn.Module):
    """Draws of `kind` along the axis that is pruned, and along others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.kind == "dropout":
            return self.outer(nn.functional.dropout(x, 0.5, training=True))
        if self.kind == "noise":
            return self.outer(x + torch.randn_like(x) * x)
        if self.kind == "coins":
            return self.outer(torch.bernoulli(x.sigmoid()))
        if self.kind == "selu":
            return self.outer(nn.functional.alpha_dropout(x, 0.5, training=True))
        return self.outer(x) + torch.randn(3)


def test_padding_that_hides_tokens_from_some_heads_is_verified() -> None:
    """A mask of minus infinity, over batch and heads in one dimension, of which heads go."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            hidden: Tensor = self.head(self.layers(x, src_key_padding_mask=pad))
            return hidden

    pad = torch.zeros(2, 5).bool()
    pad[0, 3:] = True
    program = gp.capture(Encoder().eval(), (torch.randn(2, 5, 16), pad))
    text = "prune{target=kv-heads ratio=0.5 criterion=l2},verify"
    assert gp.Pipeline.parse(text).run(program).report.passes[-1].verified is not None


@pytest.mark.parametrize("kind", ["dropout", "noise", "coins", "elsewhere"])
def test_both_sides_draw_the_same(kind: str) -> None:
    program = gp.capture(Noisy(kind).eval(), (torch.randn(4, 8),))
    result = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}").run(program)
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-5
    wrong = result.program.with_weights(
        {"outer.weight": result.program.weights["outer.weight"] * 2}
    )
    with pytest.raises(VerificationError, match="outer.weight"):
        gp.verify(program, result.plan, wrong)


def test_draws_that_cannot_be_the_same_on_both_sides_are_named() -> None:
    program = gp.capture(Noisy("selu").eval(), (torch.randn(4, 8),))
    pipeline = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2},verify")
    with pytest.raises(VerificationError, match=r"alpha_dropout.* cannot draw the same for"):
        pipeline.run(program)


@pytest.mark.parametrize("working", [False, True])
@pytest.mark.parametrize("dropout", ["alpha_dropout", "feature_alpha_dropout"])
def test_a_dropout_that_shifts_zeros_leaves_nothing_to_sum_over(
    dropout: str, working: bool
) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv1d(4, 6, 1), nn.Conv1d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = getattr(nn.functional, dropout)(self.inner(x), 0.5, training=working)
            return self.outer(h) + h.sum(1, keepdim=True)

    coupling = gp.analyze(gp.capture(Summed().eval(), (torch.randn(2, 4, 5),)))
    assert [group.size for group in coupling.groups] == ([] if working else [6])
    assert ("do not vanish" in coupling.explain("inner.weight", 0)) == working


def test_a_verification_that_no_output_depends_on_says_that_it_proves_nothing() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x).relu()) * 0 + x[:, :3]

    program = gp.capture(Deaf().eval(), (torch.randn(4, 8),))
    result = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}").run(program)
    report = gp.verify(program, result.plan, result.program)
    assert report.moved == 0
    assert not report.proves_sizes
    assert "proves nothing" in str(report)
    assert not report.to_dict()["proves_sizes"]


@pytest.mark.parametrize(
    "text", ["prune{target=ffn ratio=0.5 criterion=l2}", "merge-kv-heads{groups=2}"]
)
def test_outputs_move_with_what_goes_and_what_merges(text: str) -> None:
    program = program_of("llama-mha")
    result = gp.Pipeline.parse(text).run(program)
    report = gp.verify(program, result.plan, result.program)
    assert report.proves_sizes
    assert "proves nothing" not in str(report)


class Joins(nn.Module):
    """Makes a tensor of two parts, by writing them into memory that holds anything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = x.new_empty(*x.shape[:-1], 8)
        joined[..., :6] = self.first(x).relu()
        joined[..., 6:] = self.second(x).relu()
        return self.last(joined)


def test_parts_are_written_into_memory_that_held_what_is_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = gp.capture(Joins(), (torch.randn(2, 4),))
    coupling = gp.analyze(program)
    plan = random_plan(coupling)
    pruned = gp.apply(program, plan)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        assert gp.verify(program, plan, pruned).max_relative_error <= 1e-6
    finally:
        torch.use_deterministic_algorithms(False)
