"""Where programs are cut: at streams, never at what was pruned."""

from __future__ import annotations

import pytest
import torch
from architectures import program_of
from torch import nn

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.pipeline.pass_base import Pass
from graphprune.pipeline.pipeline import Pipeline
from graphprune.training.pieces import pieces


def after(program: Program, *passes: Pass) -> Program:
    return Pipeline(passes).run(program).program


def held(program: Program, original: Program) -> list[set[str]]:
    """The modules whose matrices are in each piece."""
    names = {n: name.rpartition(".")[0] for name, n in program.weight_nodes()}
    wide = {n for name, n in program.weight_nodes() if program.weights[name].ndim > 1}
    return [
        {names[other] for node in piece.nodes for other in node.all_input_nodes if other in wide}
        for piece in pieces(program, original)
    ]


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("llama-gqa", "model.layers.1.self_attn", "model.layers.1.mlp"),
        ("bert", "bert.encoder.layer.1.attention", "bert.encoder.layer.1"),
        ("t5", "decoder.block.1.layer.0", "decoder.block.1.layer.2"),
    ],
)
def test_attention_and_mlp_are_pieces(name: str, attention: str, mlp: str) -> None:
    program = program_of(name)
    small = after(program, Prune("ffn", 0.25, "l2"))
    found = held(small, program)
    assert sum(all(x.startswith(attention) for x in inside) for inside in found if inside) == 1
    others = [inside for inside in found if not any(x.startswith(attention) for x in inside)]
    assert sum(all(x.startswith(mlp) for x in inside) for inside in others if inside) == 1
    for piece in pieces(small, program):
        assert all(node.name == other.name for node, other in piece.goals.items())


def test_every_node_is_run_once() -> None:
    program = program_of("llama-gqa")
    small = after(program, MergeKvHeads(1, init="mean"))
    found = pieces(small, program)
    assert len(found) == 6
    nodes = [node for piece in found for node in piece.nodes]
    assert len(nodes) == len(set(nodes))
    assert nodes == [node for node in small.graph.nodes if node in set(nodes)]


def test_no_cut_is_made_where_units_went() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)]
    program = gp.capture(nn.Sequential(*layers), example_inputs=(torch.randn(4, 6),))
    whole = [{"0"}, {"2"}, {"4"}]
    assert held(program, program) == whole
    first = next(g for g in gp.analyze(program).groups if g.members[0].weight == "0.weight")
    small = after(program, Prune(first.name, 0.5, "l2"))
    assert held(small, program) == [{"0", "2"}, {"4"}]
