from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import coupling_of, inputs_of, model_of, program_of
from byte_llama import byte_llama
from torch import Tensor

import graphprune as gp
from graphprune import criteria
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError, PipelineError, SelectionError, UsageError
from graphprune.ir.program import Program
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline


def run(program: Program, *passes: Any, **options: Any) -> Result:
    return Pipeline(passes).run(program, **options)


def calibration_of(name: str) -> Calibration:
    return Calibration.from_batches([inputs_of(program_of(name))])


def weights_of(name: str) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model_of(name).named_parameters()}


# -- what it is for -------------------------------------------------------------------------------


def test_the_weakest_ffn_units_of_a_llama_go() -> None:
    program, weights = program_of("llama-gqa"), weights_of("llama-gqa")
    pruned = run(program, Prune("ffn", 0.25, "l2")).program
    for layer in (0, 1):
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (weights[name] for name in names)
        norms = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
        kept = norms.argsort()[12:].sort().values
        expected = gate[kept], up[kept], down[:, kept]
        for name, weight in zip(names, expected, strict=True):
            assert torch.equal(pruned.weights[name], weight)
    assert program.parameter_count() - pruned.parameter_count() == 2 * 12 * 3 * 32


def test_the_weakest_heads_of_a_gpt2_go() -> None:
    program, weights = program_of("gpt2"), weights_of("gpt2")
    pruned = run(program, Prune("kv-heads", 0.25, "l1")).program
    for layer in (0, 1):
        prefix = f"transformer.h.{layer}.attn"
        fused, bias = weights[f"{prefix}.c_attn.weight"], weights[f"{prefix}.c_attn.bias"]
        out = weights[f"{prefix}.c_proj.weight"]
        heads = fused.abs().sum(0) + bias.abs()
        norms = heads.view(3, 4, 8).sum((0, 2)) + out.abs().sum(1).view(4, 8).sum(1)
        kept = norms.argsort()[1:].sort().values
        expected = fused.view(32, 3, 4, 8)[:, :, kept].reshape(32, 72)
        assert torch.equal(pruned.weights[f"{prefix}.c_attn.weight"], expected)
        rows = out.view(4, 8, 32)[kept].reshape(24, 32)
        assert torch.equal(pruned.weights[f"{prefix}.c_proj.weight"], rows)
    assert pruned.kv_bytes_per_token() * 4 == program.kv_bytes_per_token() * 3


def test_the_weakest_channels_of_a_resnet_go() -> None:
    program = program_of("resnet")
    result = run(program, Prune("channels", 0.5, "l1"))
    assert result.program.parameter_count() < program.parameter_count()
    (step,) = result.plan.steps
    assert {cut.role for cut in step.cuts} == {"channel"}
    assert all(2 * cut.count == cut.size for cut in step.cuts)
    kept = result.program.weights["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    assert kept.shape == (2, 16, 1, 1)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama-gqa", "ffn"),
        ("llama-gqa", "kv-heads"),
        ("llama-gqa", "query-heads"),
        ("llama-gqa", "head-dim"),
        ("llama-gqa", "rope-dim"),
        ("llama-gqa", "hidden"),
        ("llama-gqa", "all"),
        ("llama-gqa", "*layers.1*:*"),
        ("mixtral", "ffn"),
        ("gpt2", "hidden"),
        ("gpt2", "all"),
        ("resnet", "all"),
        ("t5", "ffn"),
    ],
)
def test_every_target_is_pruned_and_verified(name: str, target: str) -> None:
    program = program_of(name)
    result = run(program, Prune(target, 0.5, "l2"))
    assert result.program.parameter_count() < program.parameter_count()
    (step,) = result.plan.steps
    assert all(2 * cut.count == cut.size for cut in step.cuts)
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "taylor"},
        {"criterion": "taylor-vector", "aggregate": "max"},
        {"criterion": "taylor", "scope": "global", "normalize": "sum"},
        {"criterion": "l1", "aggregate": "product", "scope": "global"},
        {"criterion": "l1", "aggregate": "mean", "ratio": None, "params": 0.2},
        {"criterion": "magnitude", "scope": "global", "macs": 0.1, "normalize": "max"},
        {"criterion": "l1", "scope": "global", "normalize": "loss"},
        {"criterion": "random", "round_to": 8},
        {"criterion": "l1", "runtime": "portable"},
    ],
)
def test_every_option_gives_a_verified_program(options: dict[str, Any]) -> None:
    program = program_of("llama-gqa")
    prune = Prune(**{"target": "ffn", "ratio": 0.2, **options})
    result = run(program, prune, calibration=calibration_of("llama-gqa"))
    assert 0 < len(result.plan.steps[0].cuts) <= 2
    assert Pipeline.parse(str(prune)).passes == (prune,)


def chosen(**options: Any) -> dict[str, Any]:
    given = {"target": "ffn", "ratio": 0.25, "criterion": "l2", **options}
    calibration = calibration_of("llama-gqa")
    plan = run(program_of("llama-gqa"), Prune(**given), calibration=calibration).plan
    return {cut.group: dict(cut.units) for cut in plan.steps[0].cuts}


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "l1"},
        {"criterion": "taylor"},
        {"criterion": "random"},
        {"aggregate": "product"},
        {"scope": "global"},
        {"params": 0.25},
        {"macs": 0.1},
        {"round_to": 5},
        {"runtime": "cuda"},
        {"skip": ("*.0.*",)},
        {"ratio": 0.5},
        {"target": "*"},
    ],
)
def test_every_option_matters(options: dict[str, Any]) -> None:
    assert chosen(**options) != chosen()


def test_how_scores_are_normalized_matters_in_scope_global() -> None:
    options = {"target": "all", "scope": "global"}
    found = [chosen(**options, normalize=how) for how in ("none", "mean", "max", "sum", "l2")]
    assert len({repr(each) for each in found}) > 2


def test_the_default_criterion_is_taylor() -> None:
    assert chosen(criterion="taylor") == chosen(criterion=Prune("ffn", 0.5).criterion)


def test_the_seed_of_the_run_decides_random_units() -> None:
    program, prune = program_of("llama-gqa"), Prune("ffn", 0.25, "random")
    plans = [run(program, prune, seed=seed).plan for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0].to_json() == plans[1].to_json()


# -- what it says ---------------------------------------------------------------------------------


def test_the_report_says_what_went_and_what_stayed() -> None:
    prune = Prune("*layers.0*", 0.25, "l1", skip=("*:query-slot", "*:head-dim"))
    result = run(program_of("llama-gqa"), prune)
    (record,) = result.report.passes
    assert record.details == {
        "removed": {"model.layers.0.mlp:ffn": "12 of 48"},
        "unchanged": ["model.layers.0.self_attn:kv-head"],
    }
    assert record.before.parameters - record.after.parameters == 12 * 3 * 32


def test_a_ratio_of_zero_changes_nothing_and_says_so() -> None:
    program = program_of("llama-gqa")
    result = run(program, Prune("ffn", 0, "l1"))
    assert result.program is program
    assert not result.plan
    assert result.report.passes[0].details == {"note": "a budget of 0: nothing goes"}


# -- where it stands in a pipeline -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_it_prunes_what_was_merged(name: str) -> None:
    program = program_of(name)
    passes = [MergeKvHeads(groups=2), Prune("all", 0.5, "taylor")]
    result = run(program, *passes, calibration=calibration_of(name))
    roles = [cut.role for cut in result.plan.steps[1].cuts]
    assert {"kv-head", "query-slot", "ffn", "head-dim"} <= set(roles)
    assert "residual" not in roles
    assert result.program.kv_bytes_per_token() * 8 <= program.kv_bytes_per_token()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "resnet"])
def test_it_prunes_what_was_pruned(name: str) -> None:
    program = program_of(name)
    result = run(program, Prune("all", 0.5, "l1"), Prune("all", 0.5, "l2"))
    first, second = ({c.group: c for c in step.cuts} for step in result.plan.steps)
    assert second
    for group, cut in second.items():
        assert cut.size == first[group].size - first[group].count
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-4


def test_pruning_the_residual_stream_again_keeps_the_divisor() -> None:
    program = program_of("llama-gqa")
    result = run(program, Prune("hidden", 0.25, "l1"), Prune("hidden", 0.5, "l1"))
    assert result.program.weight("model.norm.weight").shape == (12,)
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-4


# -- refusing -------------------------------------------------------------------------------------


def test_old_names_of_options_and_choices_are_read_and_the_new_ones_written() -> None:
    old = "prune{target=ffn params=0.5 scope=global normalise=l2}"
    new = "prune{target=ffn scope=global normalize=l2 params=0.5}"
    assert str(Pipeline.parse(old)) == str(Pipeline.parse(new)) == new
    yaml = "- prune: {target: [ffn], ratio: 0.5, scope: group, normalise: l2}"
    assert str(Pipeline.from_yaml(yaml)) == "prune{target=ffn ratio=0.5 scope=local normalize=l2}"
    assert Prune("ffn", 0.5, scope="group").scope == "local"  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="given twice"):
        Pipeline.parse("prune{target=ffn ratio=0.5 normalize=l2 normalise=l2}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("target=ffn", SelectionError, "no budget; give one of ratio, params, macs and kv_bytes"),
        ("ratio=0.5", PipelineError, "needs the option 'target'"),
        ("target=ffn ratio=1", SelectionError, r"ratio 1 is not in \[0, 1\)"),
        ("target=ffn ratio=-0.25", SelectionError, r"ratio -0.25 is not in \[0, 1\)"),
        ("target=ffn ratio=nan", PipelineError, "option 'ratio' wants a finite number"),
        ("target=ffn ratio=25", SelectionError, r"25 is not in \[0, 1\); 25 % is 0.25"),
        ("target=ffn ratio=a", PipelineError, "option 'ratio' wants a number, not 'a'"),
        ("target=ffn ratio=0.5 round_to=0", SelectionError, "round_to 0 is not positive"),
        ("target=ffn ratio=0.5 round_to=2.5", PipelineError, "wants a whole number"),
        ("target=ffn ratio=0.5 runtime=gpu", PipelineError, "wants one of portable, cpu, cuda"),
        ("target=ffn ratio=0.5 scope=globl", PipelineError, "did you mean 'global'"),
        ("target=ffn params=2", SelectionError, r"params 2 is not in \[0, 1\)"),
        ("target= ratio=0.5", SelectionError, "no target"),
        ("target=ffn ratio=0.5 normalize=loss", SelectionError, "add scope=global"),
        ("target=ffn ratio=0.5 aggregate=min", PipelineError, "wants one of sum, mean"),
        ("target=ffn ratio=0.5 normalize=l3", PipelineError, "did you mean 'l2'"),
        ("target=ffn ratio=0.5 normalized=l2", PipelineError, "did you mean 'normalize'"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(
    options: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Pipeline.parse(f"prune{{{options}}}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "fnn"}, SelectionError, "target 'fnn' matches no group"),
        ({"target": "channels"}, SelectionError, "target 'channels' matches no group"),
        ({"target": "fnn", "ratio": 0}, SelectionError, "target 'fnn' matches no group"),
        ({"skip": ("layers.9",)}, SelectionError, "skip pattern 'layers.9' matches no group"),
        ({"skip": ("*",)}, SelectionError, "every group of target 'ffn' is skipped"),
        (
            {"ratio": 0.001},
            SelectionError,
            "nothing to prune: 0.001 of the units, in groups of 48 units",
        ),
        ({"round_to": 64}, SelectionError, "kept in multiples of 64"),
        ({"params": 0.9}, SelectionError, "these groups hold at most"),
        ({"kv_bytes": 0.1}, SelectionError, "0.1 of the bytes of the KV cache cannot go"),
        ({"criterion": "taylor"}, CalibrationError, "needs calibration data; none was given"),
        ({"criterion": "tailor"}, UsageError, "did you mean 'taylor'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"target": "ffn", "ratio": 0.25, "criterion": "l1", **options}
    with pytest.raises(error) as caught:
        run(program_of("llama-gqa"), Prune(**given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_scored_is_refused() -> None:
    program = program_of("llama-gqa")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = program.weight(name).clone()
    weight[3, 4] = float("inf")
    group = coupling_of("llama-gqa").group("model.layers.1.mlp:ffn").name
    with pytest.raises(SelectionError, match=f"{group}: .* scores that are not finite"):
        run(program.with_weights({name: weight}), Prune("ffn", 0.25, "l2"))


# -- in steps, and with layers protected -----------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "ratio", "steps"),
    [("local", 0.5, 3), ("local", 0.25, 100), ("global", 0.5, 3), ("global", 0.3, 4)],
)
def test_steps_end_where_one_step_does(scope: Any, ratio: float, steps: int) -> None:
    options = {"criterion": "l1", "scope": scope}
    once = run(program_of("llama-gqa"), Prune("ffn", ratio, **options))
    result = run(program_of("llama-gqa"), Prune("ffn", ratio, steps=steps, **options))
    assert result.program.parameter_count() == once.program.parameter_count()
    assert 1 < len(result.plan.steps) <= steps
    assert result.report.passes[0].details["removed"].keys()


def test_steps_score_what_is_left() -> None:
    """Each step is scored on the program that the last one left."""
    calibration = calibration_of("llama-gqa")
    seen: list[int] = []

    class Seen(criteria.Criterion):
        name = "seen"

        def scores(self, context: Any) -> Any:
            seen.append(context.groups[0].size)
            return {g.name: torch.arange(g.size).double() for g in context.groups}

    try:
        run(
            program_of("llama-gqa"),
            Prune("ffn", 0.5, "seen", steps=4),
            calibration=calibration,
        )
    finally:
        del criteria.CRITERIA["seen"]
    assert seen == [48, 42, 36, 30]


@cache
def deep() -> gp.Program:
    """A decoder of sixteen layers."""
    config = tf.LlamaConfig(
        num_hidden_layers=16,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        vocab_size=32,
    )
    return gp.capture(tf.LlamaForCausalLM(config).eval())


def removed_by(**options: Any) -> set[int]:
    """The layers of the deep decoder that lose FFN units."""
    given = {"target": "ffn", "ratio": 0.25, "criterion": "l2", **options}
    removed = run(deep(), Prune(**given)).report.passes[0].details["removed"]
    return {int(name.split(".")[2]) for name in removed}


@pytest.mark.slow
def test_all_layers_of_a_deep_stack_lose_the_same_unless_some_are_protected() -> None:
    assert removed_by() == set(range(16))
    assert removed_by(protect=(2, 1)) == set(range(2, 15))


@pytest.mark.parametrize(
    ("options", "scope"),
    [
        ({"ratio": 0.5}, "local"),
        ({"params": 0.1}, "global"),
        ({"macs": 0.1, "criterion": "gate"}, "global"),
        ({"params": 0.1, "criterion": "l2"}, "local"),
        ({"params": 0.1, "criterion": "l2", "normalize": "mean"}, "global"),
        ({"params": 0.1, "criterion": "obs"}, "local"),
        ({"params": 0.1, "ratio": 0.1}, "local"),
    ],
)
def test_a_ratio_is_what_every_group_loses_and_a_budget_goes_where_it_costs_least(
    options: dict[str, Any], scope: str
) -> None:
    program = program_of("llama-gqa")
    given = {"target": ("ffn", "kv-heads"), **options}
    calibration, cuts = calibration_of("llama-gqa"), []
    for each in ({}, {"scope": "local"}, {"scope": "global"}):
        (step,) = run(program, Prune(**given | each), calibration=calibration).plan.steps
        cuts.append({cut.group: cut.units for cut in step.cuts})
    assert cuts[0] == cuts[1 if scope == "local" else 2]
    assert cuts[1] != cuts[2]


def test_outer_layers_stay_whole() -> None:
    program = program_of("gemma3")
    result = run(program, Prune("ffn", 0.5, "l1", protect=(1, 1)))
    assert list(result.report.passes[0].details["removed"]) == ["model.layers.1.mlp:ffn"]
    with pytest.raises(SelectionError, match="is in a protected layer"):
        run(program, Prune("ffn", 0.5, "l1", protect=(2, 1)))
    with pytest.raises(SelectionError, match="is in a protected layer"):
        run(program, Prune("hidden", 0.5, "l1", protect=(1, 0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0 is not positive"),
        ({"protect": (4,)}, "protect 4 is not a number of first layers and one of last"),
        ({"protect": (-1, 2)}, "protect -1,2 is not"),
    ],
)
def test_steps_and_protected_layers_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        Prune("ffn", 0.5, **options)


# -- for a runtime --------------------------------------------------------------------------------


@cache
def wide() -> gp.Program:
    """A decoder of FFN widths of 320, with four query heads on a KV head."""
    sizes = {"intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2}
    return gp.capture(byte_llama(**sizes, head_dim=8))


def run_wide(*target: str, **options: Any) -> tuple[list[int], dict[str, Any], gp.Program]:
    """FFN widths that are left, the details, and the program."""
    given: dict[str, Any] = {"target": target or ("ffn",), "criterion": "l2", **options}
    result = run(wide(), Prune(**given))
    widths = [result.program.weights[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1)]
    return [len(width) for width in widths], dict(result.report.passes[0].details), result.program


def test_a_runtime_rounds_widths_to_what_its_kernels_like() -> None:
    assert run_wide(ratio=0.3)[0] == [224, 224]
    assert run_wide(ratio=0.3, runtime="cuda")[0] == [256, 256]
    assert run_wide(ratio=0.3, runtime="tensorrt", steps=3)[0] == [256, 256]
    assert run_wide(ratio=0.33, runtime="cpu")[0] == [224, 224]
    widths, details, _ = run_wide(ratio=0.5, runtime="cuda", scope="global")
    assert all(width % 64 == 0 for width in widths)
    assert "speed hints" not in details


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_budget_of_parameters_is_met_by_sizes_that_a_runtime_likes(scope: Any) -> None:
    widths, _, program = run_wide(params=0.3, runtime="cuda", scope=scope)
    assert all(width % 64 == 0 for width in widths)
    before, left = wide().parameter_count(), program.parameter_count()
    assert 0.7 * before - 64 * 96 * len(widths) < left <= 0.7 * before


def test_a_multiple_that_is_given_wins_over_that_of_the_runtime() -> None:
    widths, details, _ = run_wide(ratio=0.3, runtime="cuda", round_to=10)
    assert widths == [230, 230]
    # Heads of 8 are off the fast path too, but were so before.
    assert details["speed hints"] == [
        "model.layers.{0-1}.mlp: FFN width 230 is no multiple of 64 (cuda)"
    ]
    assert run_wide(ratio=0.3, runtime="cuda", round_to=1)[0] == [224, 224]
    assert "speed hints" not in run_wide(ratio=0.3, round_to=10)[1]


def test_query_groups_stay_on_the_fast_path_or_the_report_says_so() -> None:
    both = ("ffn", "query-heads")
    _, details, _ = run_wide(*both, ratio=0.3, runtime="cuda")
    assert details["unchanged"] == [f"model.layers.{n}.self_attn:query-slot" for n in (0, 1)]
    assert "speed hints" not in details
    _, details, _ = run_wide(*both, ratio=0.5, runtime="cuda")
    assert details["removed"]["model.layers.1.self_attn:query-slot"] == "2 of 4"
    _, details, _ = run_wide("query-heads", ratio=0.3, runtime="cuda", round_to=1)
    (hint,) = details["speed hints"]
    assert hint.startswith("model.layers.{0-1}.self_attn: 3 query heads on a KV head leave the")


def test_what_a_runtime_has_no_smaller_size_for_is_refused_and_says_the_sizes() -> None:
    with pytest.raises(SelectionError, match="kept in one of 1, 2, 4, is less than one unit"):
        run_wide("query-heads", ratio=0.3, runtime="cuda")
    with pytest.raises(SelectionError, match="kept in multiples of 64, is less than one unit"):
        run_wide(ratio=0.1, runtime="cuda")
    with pytest.raises(SelectionError, match="these groups hold at most"):
        run_wide(params=0.7, runtime="cuda")
