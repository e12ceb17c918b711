"""A program as a `torch.export.ExportedProgram`, which torch's own tools take."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.verifier import load_verifier
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from graphprune.ir.program import Program

_KINDS = {
    "parameter": InputKind.PARAMETER,
    "buffer": InputKind.BUFFER,
    "derived": InputKind.BUFFER,
    "constant": InputKind.CONSTANT_TENSOR,
}


def own_exported_program(program: Program) -> ExportedProgram:
    """Return `program` for torch's own tools, with copies of its weights.

    What is trained of it changes no program that shared them.
    """
    weights = {name: weight.clone() for name, weight in program.operands.items()}
    return to_exported_program(dataclasses.replace(program, weights=weights))


def to_exported_program(program: Program) -> ExportedProgram:
    """`program` as a `torch.export.ExportedProgram` that shares its graph and weights.

    Every node must carry an up-to-date ``meta["val"]``, which the rewriter sees to.
    """
    specs: list[InputSpec] = []
    state: dict[str, Tensor | nn.Parameter] = {}
    constants: dict[str, Any] = {}
    operands = program.take(program.weights)
    for name, node in program.weight_nodes():
        kind = program.kinds[name]
        persistent = kind == "buffer" if kind in ("buffer", "derived") else None
        argument = TensorArgument(name=node.name)
        specs.append(InputSpec(_KINDS[kind], argument, target=name, persistent=persistent))
        weight = operands[name]
        if kind == "parameter":
            state[name] = nn.Parameter(weight, requires_grad=False)
        elif kind == "buffer":
            state[name] = weight
        else:
            constants[name] = weight
    for _, node in program.input_nodes():
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), target=None))
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), target=None)
        for _, node in program.output_nodes()
    ]
    arguments = tuple(range(len(program.inputs)))
    in_spec = pytree.tree_flatten((arguments, {}))[1]
    out_spec = pytree.tree_flatten(tuple(range(len(program.outputs))))[1]
    root = ModuleCallSignature(
        inputs=[],  # names do not survive decomposition
        outputs=[],
        in_spec=in_spec,
        out_spec=out_spec,
    )
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=program.graph,
        graph_signature=ExportGraphSignature(input_specs=specs, output_specs=outputs),
        state_dict=state,
        range_constraints=dict(program.ranges),
        module_call_graph=[ModuleCallEntry(fqn="", signature=root)],
        example_inputs=None,
        constants=constants,
        # Captured graphs keep in-place operators, which the default verifier refuses.
        verifiers=[load_verifier("TRAINING")],
    )
