"""A program as an `nn.Module` to train: its own weights, by the names of the original.

A transformers model comes back as its own class wherever that can hold the program. Any other
program becomes a module that runs the graph: calling `train()` switches on its dropout and the
statistics of its batch norms, as a whole or module by module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from graphprune.backends.huggingface.choose_form import choose_form
from graphprune.errors import BackendError
from graphprune.ir.nodes import arguments_of, copy_of, set_argument
from graphprune.ir.program import Kind, Program
from graphprune.ir.provenance import module_path
from graphprune.weights.models import fill, stand_for, stored_weights

_SWITCHES = ("train", "training")
"""Names of the arguments of operators that say whether the model is being trained."""


def to_module(program: Program) -> nn.Module:
    """Make a module that computes what `program` does, with weights of its own.

    Parameters
    ----------
    program
        Any program with weights. Dropout inside a fused attention operator stays off: capture does
        not see how much of it there was.

    Returns
    -------
    nn.Module
        In evaluation mode; every floating parameter requires a gradient. For a transformers model
        whose result has a plain or remote-code form, a model of its transformers class. Otherwise a
        module with the inputs, the outputs and the ``state_dict`` names of the original.

    Raises
    ------
    BackendError
        When the program has no weights.
    """
    if program.lacks_values:
        raise BackendError("the program's weights are on the meta device: there is no module of it")
    if program.source is not None:
        model = choose_form(program).model
        if model is not None:
            stored = stored_weights(model)
            stand_for(model, {})  # a copy of the model would hold copies of them
            model = copy.deepcopy(model)
            stand_for(model, stored)
            fill(model)
            return model.requires_grad_(True).eval()
    return ProgramModule(program).eval()


class ProgramModule(nn.Module):
    """A module that runs the graph of a program, with a copy of its weights.

    Parameters
    ----------
    program
        A program; it is copied and left alone.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, weight in program.operands.items():
            self._hold(name, weight.detach().clone(), program.kinds[name])
        for alias, name in program.aliases.items():
            self._hold(alias, self._held(name), program.kinds[name])
        graph, copies = copy_of(program.graph)
        self._switched = self._add_switches(program, copies)
        for node in graph.nodes:
            node.meta = {}  # its sizes and paths are those of the program
        self._names = tuple(program.weights)
        self._outputs = tuple(value.name for value in program.outputs)
        self._run = fx.GraphModule(nn.Module(), graph)
        nothing = fx.GraphModule(nn.Module(), fx.Graph())
        self._signature = replace(
            program, graph_module=nothing, weights={}, kinds={}, source=None, ranges={}
        )

    def forward(self, *args: Tensor, **inputs: Tensor) -> Any:
        """Run the graph; returns what the original returns, its classes of outputs aside.

        Parameters
        ----------
        args, inputs
            As the program takes them: in its order, or by name. A cache may be left out, as may an
            attention mask.

        Raises
        ------
        UsageError
            When an input is missing, unknown, or of a size that the graph does not take.
        """
        values = self._signature.inputs
        named = {value.name: arg for value, arg in zip(values, args, strict=False)}
        filled = self._signature.fill({**named, **inputs})
        weights = [self._held(name) for name in self._names]
        training = [self.get_submodule(path).training for path in self._switched]
        given = [filled[value.name] for value in values]
        return _nested(self._outputs, self._run(*weights, *given, *training))

    def _hold(self, name: str, tensor: Tensor, kind: Kind) -> None:
        path, _, last = name.rpartition(".")
        module = self._submodule(path)
        if kind == "parameter":
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, tensor.is_floating_point())
            module.register_parameter(last, tensor)
        else:
            module.register_buffer(last, tensor, persistent=kind == "buffer")

    def _held(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        held: Tensor = getattr(self.get_submodule(path), last)
        return held

    def _submodule(self, path: str) -> nn.Module:
        """Return the module at `path`, which is made where there is none."""
        module: nn.Module = self
        for step in path.split(".") if path else ():
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        return module

    def _add_switches(self, program: Program, copies: Mapping[fx.Node, fx.Node]) -> tuple[str, ...]:
        """Let operators that work only in training ask their module; returns its path for each."""
        paths: dict[str, fx.Node] = {}
        last = [copies[node] for node in program.graph.find_nodes(op="placeholder")][-1:]
        for node, own in copies.items():
            switch = next((n for n in _SWITCHES if arguments_of(node).get(n) is False), None)
            if switch is None:
                continue
            path = module_path(node)
            self._submodule(path)
            if path not in paths:
                with own.graph.inserting_after(*[*paths.values(), *last][-1:]):
                    paths[path] = own.graph.placeholder(f"training_{len(paths)}")
                last = []
            set_argument(own, switch, None, paths[path])
        return tuple(paths)


def _nested(names: Sequence[str], tensors: Sequence[Tensor]) -> Any:
    """Return outputs as they were nested: tuples by number, dictionaries by name."""
    tree: dict[str, Any] = {}
    for name, tensor in zip(names, tensors, strict=True):
        *path, last = name.split(".")
        inner = tree
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = tensor
    built = _built(tree)
    return built["output"] if list(tree) == ["output"] else built


def _built(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if all(key.isdigit() for key in tree):
        return tuple(_built(value) for value in tree.values())
    return Outputs({key: _built(value) for key, value in tree.items()})


class Outputs(dict[str, Any]):
    """Outputs by name, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error
