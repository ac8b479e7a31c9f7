"""Weights of recurrent layers rounded by GPTQ, for the inputs and the states that they meet."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import constant, set_constant
from ..network.statistics import walk
from ..numerics.hessian import output_error
from ..numerics.recurrent import what_matrices_meet
from .formats import Format
from .grouped import Steps, nearest, solved, steps_of
from .placement import RECURRENT
from .recurrent import matrices


def round_recurrent(network: Network, formats: Mapping[str, Format], fit: Sequence[list[Tensor]], held: Sequence[list[Tensor]]) -> dict[str, Steps]:
    """Put the matrices of recurrent layers named in ``formats`` on their grids, in place, layer after layer.

    Each for the inputs, or states, that it meets in ``network`` while its own layer is in float: rounded by GPTQ, where that errs less on held-back
    data than rounding to nearest.

    Args:
        fit: flat inputs to solve on. held: others, to choose by.

    Returns: by weight its steps. Matrices that others read too are not there, and stay as they are.
    """
    found: dict[str, Steps] = {}
    for node in [node for node in network.graph.nodes if node.target in RECURRENT]:
        if any(constant(network, one) is None for one in node.args[2]):
            continue
        both = zip(matrices(network, node), _grams(network, node, fit), _grams(network, node, held), strict=True)
        for one, of_fit, of_held in both:
            name = str(one.target)
            if name in formats and name not in found and len(one.users) == 1 and list(node.args[2]).count(one) == 1:
                weight = constant(network, one).detach()
                rounded, found[name] = _rounded(weight, formats[name], of_fit, of_held)
                set_constant(network, one, rounded.to(weight.dtype))
    return found


def _rounded(weight: Tensor, wanted: Format, fit: Tensor, held: Tensor) -> tuple[Tensor, Steps]:
    """To nearest, or by GPTQ with steps for the weights' error or for the outputs': what errs least."""
    plain = steps_of(weight, wanted)
    ways = [(nearest(weight, wanted, plain), plain)]
    for steps in (plain, steps_of(weight, wanted, fit.diagonal().float())):
        ways.append((solved(weight[None], fit[None], wanted, steps)[0], steps))
    return min(ways, key=lambda way: float(output_error(way[0] - weight, held).sum()))


def _grams(network: Network, node: fx.Node, pieces: Sequence[list[Tensor]]) -> list[Tensor]:
    """Sums of ``x x^T`` over what each matrix of a recurrent layer meets, double precision."""
    grams: list[Tensor] = []

    def record(args: tuple[Any, ...], value: Any) -> None:
        x, hidden, parameters, biased, layers, _, _, both, first = args
        rows = what_matrices_meet(node.target, x.transpose(0, 1) if first else x, hidden, parameters, biased, layers, both)
        made = [one.double().mT @ one.double() for one in rows]
        grams[:] = [old + new for old, new in zip(grams, made, strict=True)] if grams else made

    with torch.no_grad():
        for leaves in pieces:
            walk(network, leaves, {node: record})
    return grams
