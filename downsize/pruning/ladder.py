"""What each width of each axis costs in error: which units go first, and how far the network's outputs then are from the original's."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ..network.columns import weight_from_matrix, weight_matrix
from ..network.network import Network
from ..network.rewrite import argument, constant, set_bias, set_constant
from ..numerics.removal import Reading, remove, repaired
from .sites import Reader, Site

# Shares of an axis that are tried.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# Beyond this squared relative error of the outputs a network has lost its skill, and smaller widths need not be looked at.
HOPELESS = 1.0
# Units that go at a time, as a share of all: choosing them one by one is slow in wide layers, and no better.
STEP = 1 / 64
# A unit whose variance is less than this part of its mean square is constant: the rest is the rounding of products in single precision.
CONSTANT = 1e-6


@dataclass(frozen=True, eq=False)
class Ladder:
    """An axis with the order in which its units go (the first goes first, [units]) and, for the widths tried (falling, the first is all), the
    error: sum |outputs - original's|^2 / sum |original's|^2 on held-back data, or a stand-in without data; infinite where not looked at."""

    site: Site
    order: Tensor
    widths: tuple[int, ...]
    errors: tuple[float, ...]

    def dead(self, level: int) -> list[int]:
        """The units that go at a level."""
        return self.order[: self.site.axis.units - self.widths[level]].tolist()


def widths_of(site: Site, multiple: int) -> tuple[int, ...]:
    """The widths to try: shares of the axis, rounded to multiples of what kernels like where it has several of them, and none at all where
    the sub-layer around it can go."""
    units = site.axis.units
    grain = multiple if units >= 4 * multiple and site.axis.kind != "heads" else 1
    rounded = {max(grain, round(units * share / grain) * grain) for share in SHARES} | ({0} if site.emptiable else set())
    return (units, *sorted((width for width in rounded if width < units), reverse=True))


def readings(site: Site, network: Network, grams: Mapping[str, Tensor]) -> list[Reading]:
    """The readers as readings for :func:`~downsize.numerics.removal.remove`, one a group, each weighted by 1 / its output's energy.

    The bias is a column that never goes: a unit whose output is constant costs nothing.
    """
    nodes = {node.name: node for node in network.graph.nodes}
    found = []
    for reader in site.readers:
        weight, gram = _with_bias(network, nodes[reader.node], reader), grams[reader.node]
        energy = float(((weight @ gram) * weight).sum())
        unit = torch.cat([reader.unit, torch.tensor([-1])])
        found += [Reading(part, own, unit, 1 / max(energy, 1e-30)) for part, own in zip(weight, gram, strict=True)]
    return found


def _with_bias(network: Network, node: object, reader: Reader) -> Tensor:
    """[groups, rows, columns + 1], double precision."""
    weight = weight_matrix(constant(network, node.args[1]).detach(), reader.groups).double()
    bias = constant(network, argument(node, 2, "bias"))
    column = torch.zeros(weight.shape[:2], dtype=torch.float64) if bias is None else bias.detach().double().reshape(weight.shape[:2])
    return torch.cat([weight, column[:, :, None]], 2)


def surgeon_order(site: Site, found: Sequence[Reading], damping: float) -> Tensor:
    """All units in the order in which optimal brain surgery removes them; those that come last stay longest.

    Units that never vary go first: the bias takes over what they give, which the damping would hide.
    """
    units = site.axis.units
    order = remove(found, units, units, grain=max(1, int(units * STEP)), damping=damping).order
    varies = torch.zeros(units, dtype=torch.bool)
    for reading in found:
        count = reading.gram[-1, -1]
        squares = reading.gram.diagonal() / count
        moving = squares - (reading.gram[-1] / count).square() > CONSTANT * squares
        varies[reading.unit[moving & (reading.unit >= 0)]] = True
    return torch.cat([order[~varies[order]], order[varies[order]]])


def without(network: Network, site: Site, grams: Mapping[str, Tensor], gone: Tensor, damping: float) -> Network:
    """A fork whose readers do without these units: their columns are zero, the others make up for it (see ``repaired``).

    It computes what the cut network does, if the site's readers are all there are.
    """
    made = network.fork()
    for reader in site.readers:
        repair_reader(made, reader, grams[reader.node], torch.isin(reader.unit, gone), damping)
    made.recompile()
    return made


def repair_reader(network: Network, reader: Reader, gram: Tensor, gone: Tensor, damping: float) -> None:
    """Give a reader the weight and bias, in place, that come nearest to its outputs without the columns ``gone`` (bool [columns]).

    Zeros of a sparse weight stay zeros, whatever that costs; a refit of the layer on its support comes later.
    """
    node = next(node for node in network.graph.nodes if node.name == reader.node)
    old = constant(network, node.args[1])
    unit = torch.cat([torch.where(gone, 0, -1), torch.tensor([-1])])
    parts = zip(_with_bias(network, node, reader), gram, strict=True)
    new = torch.stack([repaired(Reading(weight, own, unit), torch.tensor([0]), damping) for weight, own in parts])
    if node.args[1].target in network.sparse:
        new[:, :, :-1] *= weight_matrix(old, reader.groups) != 0
    set_constant(network, node.args[1], weight_from_matrix(new[:, :, :-1], old.shape).to(old.dtype).contiguous())
    set_bias(network, node, new[:, :, -1].reshape(-1).to(old.dtype))


def climb(site: Site, order: Tensor, widths: Sequence[int], judge: Callable[[Network], float], without_units: Callable[[Tensor], Network]) -> Ladder:
    """The ladder of a site: the network ``without_units(gone)`` is judged at each width, until it has lost its skill."""
    errors = [0.0]
    for width in widths[1:]:
        # Errors of few samples may fall with the width by chance; what is removed does not come back.
        last = errors[-1]
        errors.append(inf if last >= HOPELESS else max(last, judge(without_units(order[: site.axis.units - width]))))
    return Ladder(site, order, tuple(widths), tuple(errors))


def fold_constant_units(network: Network, reader: Reader, gram: Tensor, gone: Tensor) -> None:
    """Add to a reader's bias, in place, what those of the columns ``gone`` (bool [columns]) give that never vary over the data."""
    node = next(node for node in network.graph.nodes if node.name == reader.node)
    count = gram[:, -1:, -1]
    mean = gram[:, :-1, -1] / count
    squares = gram.diagonal(dim1=1, dim2=2)[:, :-1] / count
    constants = gone & (squares - mean.square() <= CONSTANT * squares) & (squares > 0)
    if bool(constants.any()):
        weight = _with_bias(network, node, reader)
        shift = (weight[:, :, :-1] @ (mean * constants)[:, :, None])[:, :, 0]
        dtype = constant(network, node.args[1]).dtype
        set_bias(network, node, (weight[:, :, -1] + shift).reshape(-1).to(dtype))
