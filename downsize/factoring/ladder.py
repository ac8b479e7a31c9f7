"""What each way of doing each layer costs, and how far the network's outputs then are from the original's."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..network.judge import TailJudge
from ..network.network import Network
from ..network.rewrite import argument, aten, constant, set_bias, set_constant
from ..network.statistics import Hook, walk
from ..pruning.grams import GRAM_ELEMENTS, gram_matrices
from ..pruning.pieces import Data
from .costs import Costs, as_they_are
from .forms import Decomposed, Known, composed
from .layers import Layer, is_tied, weight_node
from .options import Option, Way, undominated, ways_of
from .rewriting import Product

# Of the ways of a layer so many are judged by the outputs, the others lie between them.
POINTS = 5
# On about so many samples: of the outputs of a whole network few say enough.
JUDGED = 64
# Below this part of a layer's energy an error is rounding.
SMALLEST = 1e-9
# A layer whose Gram matrix has more elements than this, of all groups, is decomposed without data.
LARGEST_GRAM = 6000**2

Site = tuple[Layer, ...]


@dataclass(frozen=True)
class Asked:
    """What is looked at: forms of convolutions, the grain of ranks, whether layers that read the same value may share a factor, the damping of
    Gram matrices; ``judged``: whether errors are those of the network's outputs, or the layers' own; ``evidence``: only the ranks that
    variational Bayes finds."""

    forms: tuple[str, ...]
    multiple: int
    joint: bool
    damping: float
    judged: bool
    evidence: bool = False


def climbed(
    network: Network, sites: Iterable[tuple[Site, Known]], costs: Costs, asked: Asked, data: Data | None
) -> tuple[list[list[Way]], dict[str, str]]:
    """The ways of every site, none dominated; the first leaves it as it is unless another is no worse and cheaper. And by name of layer
    what the cheapest factors cost, where none pay."""
    nodes = {node.name: node for node in network.graph.nodes}
    rank = {name: number for number, name in enumerate(nodes)}
    tail = TailJudge(network, few(data.trial)) if data is not None and asked.judged else None
    found: list[list[Way]] = []
    refused: dict[str, str] = {}
    for site, known in sites:
        if tail is not None:
            tail.move(nodes[min((name for layer in site for name in layer.readers), key=rank.__getitem__)])
        # A table and a layer with one weight have factors together, or none.
        single = [site] if is_tied(site) else [(layer,) for layer in site]
        alone = [_options(network, layers, known, costs, asked, tail) for layers in single]
        refused |= {layers[0].name: note for layers, (_, note) in zip(single, alone, strict=True) if note}
        dense = [Option(layers, "dense", (), 0.0, costs.dense(*layers)) for layers in single]
        together = _options(network, site, known, costs, asked, tail)[0] if asked.joint and len(single) > 1 else []
        found.append(ways_of([[one, *others] for one, (others, _) in zip(dense, alone, strict=True)], together))
    return found, refused


def few(pieces: Sequence[list[Tensor]]) -> Sequence[list[Tensor]]:
    """Some of the pieces, with about :data:`JUDGED` samples."""
    samples = len(pieces) * max((leaf.shape[0] for leaf in pieces[0] if leaf.dim()), default=1)
    return pieces[:: max(1, -(-samples // JUDGED))]


def _options(
    network: Network, layers: Site, known: Known, costs: Costs, asked: Asked, judge: Callable[[Network], float] | None
) -> tuple[list[Option], str]:
    """The options of the layers together that pay, each with its error; or why there is none."""
    made = Decomposed(layers, [layer.dense.weight for layer in layers], known, asked.forms)
    wanted = made.by_evidence() if asked.evidence else made.candidates(asked.multiple)
    tried = [(form, ranks, *made.products(form, ranks)) for form, ranks in wanted]
    if not tried:
        return [], "dense: no form applies"
    dense = as_they_are(layers)
    whole, *prices = costs.several([dense, *(products for _, _, products, _ in tried)])
    found = [
        Option(layers, form, ranks, error, price)
        for (form, ranks, products, error), price in zip(tried, prices, strict=True)
        if price < whole and costs.lighter(products, dense)
    ]
    if not found:
        return [], f"dense: {costs.measure} {min(prices):.6g} with factors, {whole:.6g} without"
    front = undominated(found)
    if judge is None:
        return [replace(option, error=option.own * len(layers)) for option in front], ""
    return judged(front, lambda option: judge(imitated(network, made.products(option.form, option.ranks)[0]))), ""


def judged(front: Sequence[Option], judge: Callable[[Option], float]) -> list[Option]:
    """The options with the errors of the network's outputs: of some as they are judged, of those between them interpolated by the logarithm
    of their own errors. They never fall while the own errors rise."""
    rising = sorted(front, key=lambda option: option.own)
    picked = np.unique(np.linspace(0, len(rising) - 1, min(POINTS, len(rising))).round().astype(int))
    errors = np.maximum.accumulate([judge(rising[number]) for number in picked])
    own = [log(max(option.own, SMALLEST)) for option in rising]
    between = np.interp(own, [own[number] for number in picked], [log(max(error, SMALLEST**2)) for error in errors])
    return [replace(option, error=exp(error)) for option, error in zip(rising, between, strict=True)]


def imitated(network: Network, products: Sequence[Product]) -> Network:
    """A fork with the same graph that computes what it would with the factors: each layer has their product as its weight."""
    made = network.fork()
    nodes = {node.name: node for node in made.graph.nodes}
    for product in products:
        old = made.tensor(product.layer.name)
        weight = product.layer.dense.stored(composed(product)).to(old.dtype)
        for name in product.layer.readers:
            node = nodes[name]
            if node.target is not aten.embedding.default and bool(product.shift.any()):
                bias = constant(made, argument(node, 2, "bias"))
                set_bias(made, node, product.shift.to(old.dtype) + (0 if bias is None else bias.detach()))
            if made.tensor(str(weight_node(node).target)) is old:
                set_constant(made, weight_node(node), weight)
    made.recompile()
    return made


# What is read ----------------------------------------------------------------------------------------------------------------------


class Knowledge:
    """What the layers of each site read. All is kept where there is room for it, else found again each time it is asked for."""

    def __init__(self, network: Network, sites: Sequence[Site], damping: float, data: Data | None) -> None:
        self._ask = partial(with_known, network, damping=damping, data=data)
        self.sites = list(sites)
        self._kept: dict[Site, Known] | None = None
        self._fits = data is None or sum(_gram_elements(_reader(site)) for site in sites) <= GRAM_ELEMENTS

    def of(self, sites: Sequence[Site]) -> Iterable[tuple[Site, Known]]:
        """Of these sites, each with what is known."""
        if not self._fits:
            return self._ask(sites)
        if self._kept is None:
            self._kept = dict(self._ask(self.sites))
        return [(site, self._kept[site]) for site in sites]


def with_known(network: Network, sites: Sequence[Site], damping: float, data: Data | None) -> Iterator[tuple[Site, Known]]:
    """Each site with what its layers read; several passes over the data where the Gram matrices of all are too many to hold."""
    if data is None:
        yield from ((site, Known()) for site in sites)
        return
    batch: list[Site] = []
    room = GRAM_ELEMENTS
    for site in sites:
        size = _gram_elements(_reader(site))
        if batch and size > room:
            yield from _known(network, batch, damping, data)
            batch, room = [], GRAM_ELEMENTS
        batch.append(site)
        room -= size
    yield from _known(network, batch, damping, data)


def _reader(site: Site) -> Layer:
    """The layer of a site that reads for all: of a table and a linear layer with one weight the linear layer."""
    return site[-1]


def _gram_elements(layer: Layer) -> int:
    """Of all groups; 0 where there is none to be made."""
    if layer.kind == "embedding":
        return 0
    size = layer.dense.groups * (layer.dense.weight[0].numel() + 1) ** 2
    return size if size <= LARGEST_GRAM else 0


def _known(network: Network, batch: Sequence[Site], damping: float, data: Data) -> Iterator[tuple[Site, Known]]:
    nodes = {node.name: node for node in network.graph.nodes}
    read = [name for site in batch if _gram_elements(_reader(site)) for name in _reader(site).readers]
    grams = gram_matrices(network, [nodes[name] for name in read], data.fit, data.port) if read else {}
    counts = _counts(network, [site[0] for site in batch if site[0].kind == "embedding"], data)
    for site in batch:
        found = [grams.pop(name) for name in _reader(site).readers if name in grams]
        yield site, Known(sum(found) if found else None, counts.get(site[0].name), damping)


def _counts(network: Network, tables: Sequence[Layer], data: Data) -> dict[str, Tensor]:
    """How often each row of each table is looked up at positions that are no padding, by the table's name: [tokens], double precision."""
    nodes = {node.name: node for node in network.graph.nodes}
    found = {layer.name: torch.zeros(len(layer.dense.weight), dtype=torch.float64) for layer in tables}

    def hook(layer: Layer, mask: Tensor | None) -> Hook:
        def record(args: tuple[Any, ...], value: Any) -> None:
            ids = args[1] if mask is None or args[1].shape != mask.shape else args[1][mask]
            found[layer.name] += torch.bincount(ids.reshape(-1), minlength=len(layer.dense.weight))

        return record

    for leaves in data.fit if tables else ():
        mask = leaves[data.port].bool() if data.port is not None else None
        walk(network, leaves, {nodes[name]: hook(layer, mask) for layer in tables for name in layer.readers})
    return found
