"""What a network costs as a function of the widths of its axes: sums of products of widths.

The size of a dimension is a sum over its positions, each of which belongs to no axis, to one, or (head, member) to several; where every
unit of an axis has as many positions, the size is a polynomial in the relative widths. MACs and parameters are products of sizes.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalIterable=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from torch import fx
from torch.nn import Parameter

from ..network.atoms import NEVER, Ids
from ..network.cost import COUNTED
from ..network.lineage import Lineage
from ..network.lineage_rules import operator_name
from ..numerics.allocation import Term

# The axes whose relative widths are multiplied, with repetition -> the factor.
Polynomial = dict[tuple[int, ...], float]


class Costs:
    """Polynomials of a network's MACs (at the example's sizes) and parameters in the relative widths of the given axes.

    Args:
        axes: numbers stand for these in the polynomials.

    Operators that have MACs but no formula of widths here are left out; :attr:`left_out` names them.
    """

    def __init__(self, lineage: Lineage, axes: Sequence[Any]) -> None:
        self.lineage = lineage
        self.axes = tuple(axes)
        self.left_out: set[str] = set()
        members = lineage.atoms.members()
        owner = np.full(len(members), -1)
        for number, axis in enumerate(axes):
            owner[axis.atoms] = number
        self._owners = owner[members]  # [ids, most atoms of one id]
        self._owners[members == NEVER] = -1

    def size(self, vector: Ids) -> Polynomial:
        """The size of a dimension."""
        owners = np.sort(self._owners[vector], axis=1)
        found: Polynomial = {}
        for row, count in zip(*np.unique(owners, axis=0, return_counts=True), strict=True):
            key = tuple(int(one) for one in row if one >= 0)
            found[key] = found.get(key, 0.0) + float(count)
        return found

    @cached_property
    def parameters(self) -> Polynomial:
        """Elements of the trainable tensors."""
        tensors = [(self.lineage.network.tensor(name), dims) for name, dims in self.lineage.constants.values()]
        return total([product(map(self.size, dims)) for tensor, dims in tensors if isinstance(tensor, Parameter)])

    @cached_property
    def macs(self) -> Polynomial:
        """Multiply-accumulates."""
        return total(self.macs_by_node().values())

    def macs_by_node(self) -> dict[fx.Node, Polynomial]:
        """Multiply-accumulates of each operator that has some."""
        found: dict[fx.Node, Polynomial] = {}
        for node in self.lineage.network.graph.nodes:
            if node.op == "call_function" and node.target in COUNTED:
                sizes = SIZES.get(operator_name(node))
                if sizes is None:
                    self.left_out.add(operator_name(node))
                    continue
                found[node] = total(product(map(self.size, vectors)) for vectors in sizes(self.lineage.dims, node))
        return found

    def terms(self, polynomial: Polynomial, widths: Sequence[np.ndarray]) -> tuple[Term, ...]:
        """A polynomial as terms over the levels of the axes: ``widths[i]`` are the relative widths of axis i's levels.

        Of a product of three axes or more the two with the most levels count; the others stay at full width: never too little.
        """
        made = []
        for key, factor in polynomial.items():
            powers = Counter(key)
            axes = sorted(powers, key=lambda one: -len(widths[one]))[:2]
            table = np.asarray(factor)
            for one in axes:
                table = np.multiply.outer(table, widths[one] ** powers[one])
            made.append(Term(tuple(axes), table))
        return tuple(made)


def evaluate(polynomial: Polynomial, widths: Sequence[float]) -> float:
    """The value at relative widths."""
    return sum(factor * prod(widths[one] for one in key) for key, factor in polynomial.items())


def total(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Their sum."""
    found: Polynomial = {}
    for polynomial in polynomials:
        for key, factor in polynomial.items():
            found[key] = found.get(key, 0.0) + factor
    return found


def product(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Their product."""
    found: Polynomial = {(): 1.0}
    for polynomial in polynomials:
        merged: Polynomial = {}
        for one, factor in found.items():
            for two, other in polynomial.items():
                key = tuple(sorted((*one, *two)))
                merged[key] = merged.get(key, 0.0) + factor * other
        found = merged
    return found


# Which dimensions an operator's MACs are the product of; several lists are added -----------------------------------------------------

Sizes = Callable[[dict[fx.Node, Any], fx.Node], list[list[Ids]]]


def _convolution(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    return [[*dims[node], *dims[node.args[1]][1:]]]


def _transposed(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    return [[*dims[node.args[0]], *dims[node.args[1]][1:]]]


def _linear(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    return [[*dims[node], dims[node.args[1]][1]]]


def _matmul(left: int) -> Sizes:
    return lambda dims, node: [[*dims[node], dims[node.args[left]][-1]]]


def _attention(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    query, key, value = (dims[part] for part in node.args[:3])
    return [[*dims[node][:-1], key[-2], query[-1]], [*dims[node][:-1], key[-2], value[-1]]]


def _recurrent(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    return [[*dims[node.args[0]][:-1], *dims[weight]] for weight in node.args[2] if len(dims[weight]) == 2]


def _einsum(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    operands = [dims[operand] for operand in node.args[1]]
    if len(operands) < 2:
        return []
    letters: dict[str, Ids] = {}
    for term, vectors in zip(node.args[0].replace(" ", "").split("->")[0].split(","), operands, strict=True):
        before, dots, behind = term.partition("...")
        hidden = [f".{i}" for i in range(len(vectors) - len(before) - len(behind), 0, -1)] if dots else []
        for letter, vector in zip([*before, *hidden, *behind], vectors, strict=True):
            letters[letter] = max(vector, letters.get(letter, vector), key=len)
    return [list(letters.values())]


def _outer(dims: dict[fx.Node, Any], node: fx.Node) -> list[list[Ids]]:
    return [[*dims[node]]]


SIZES: dict[str, Sizes] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "linear": _linear, **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), _matmul(0)), **dict.fromkeys(("addmm", "addmv", "baddbmm"), _matmul(1)),
    "scaled_dot_product_attention": _attention, "einsum": _einsum,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "dynamic_lstm"), _recurrent),
    "outer": _outer,
}  # fmt: skip


def macs_of(network: Any) -> float:
    """The multiply-accumulates of a network at the example's sizes, by shapes alone."""
    return evaluate(Costs(Lineage(network), ()).macs, ())
