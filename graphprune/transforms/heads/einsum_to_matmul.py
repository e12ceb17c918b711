"""Einstein sums of attention, spelled as matrix products: batch axes first, then rows and columns.

That changes no value; keys and values then have their heads where those of every attention lie.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from graphprune.analysis.operators.contraction import letters_of
from graphprune.ir.nodes import copy_of, made_from
from graphprune.ir.program import Program
from graphprune.ir.shape_propagation import with_graph

_ATEN = torch.ops.aten


def with_matrix_products(program: Program, sums: Collection[fx.Node]) -> Program:
    """Return `program` with some of its Einstein sums as matrix products.

    Parameters
    ----------
    program
        The program.
    sums
        Nodes of its graph; those that are no Einstein sum of two operands, or that sum over more
        or less than one axis, stay as they are.
    """
    graph, new = copy_of(program.graph)
    changed = [node for node in sums if _spell(graph, new[node])]
    return with_graph(program, graph, program.weights, {}) if changed else program


def _spell(graph: fx.Graph, node: fx.Node) -> bool:
    if node.target is not _ATEN.einsum.default or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return False
    equation, operands = node.args[:2]
    ranks = [each.meta["val"].ndim for each in operands]  # type: ignore[union-attr]
    (left, right), output = letters_of(equation, ranks)  # type: ignore[arg-type]
    summed = [letter for letter in left if letter not in output]
    rows = [letter for letter in output if letter in left and letter not in right]
    columns = [letter for letter in output if letter in right and letter not in left]
    plain = all(len(set(term)) == len(term) for term in (left, right, output))
    if not plain or len(summed) != 1 or not rows or not columns or set(right) - set(output + left):
        return False
    if summed[0] not in right or set(output) - set(left + right):
        return False
    batch = [letter for letter in output if letter not in (rows[-1], columns[-1])]
    result = [*batch, rows[-1], columns[-1]]
    sides = ((left, [*batch, rows[-1], summed[0]]), (right, [*batch, summed[0], columns[-1]]))
    with graph.inserting_before(node):
        factors = []
        for operand, (term, wanted) in zip(operands, sides, strict=True):  # type: ignore[arg-type]
            dims = [term.index(letter) for letter in wanted if letter in term]
            if dims != sorted(dims):
                operand = made_from(node, _ATEN.permute.default, operand, dims)
            for at, letter in enumerate(wanted):
                if letter not in term:
                    operand = made_from(node, _ATEN.unsqueeze.default, operand, at)
            factors.append(operand)
        product = made_from(node, _ATEN.matmul.default, *factors)
        dims = [result.index(letter) for letter in output]
        if dims != sorted(dims):
            product = made_from(node, _ATEN.permute.default, product, dims)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return True
