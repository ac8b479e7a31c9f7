"""Smaller students made from a network: every other layer, or half of every width."""

from __future__ import annotations

from ..errors import TaskError
from ..network.blocks import blocks, bypass
from ..network.empty import shrunk
from ..network.lineage import Lineage
from ..network.network import Network
from ..pruning.depth import main_layers
from ..pruning.importance import scores
from ..pruning.sites import sites
from ..pruning.structure import prepared

KINDS = ("channels", "heads", "neurons", "width")


def shallow(network: Network) -> Network:
    """The network with every other one of its repeated layers, beginning with the first (as Sanh et al. 2019, DistilBERT, arXiv 1910.01108).

    Raises:
        TaskError: it has fewer than two layers that can be taken out.
    """
    found = main_layers(blocks(network))
    if len(found) < 2:
        raise TaskError(f"student='depth' leaves out every other repeated layer; the network has {len(found)} of them: use student='width'.")
    return bypass(network, [block.name for block in found[1::2]])


def narrow(network: Network) -> Network:
    """The network with half of the units of every axis, those with the largest weights (L2); also of axes that cross a layer norm.

    Raises:
        TaskError: it has no axis that can be cut.
        CutError: the network is quantized.
    """
    plain = prepared(network, fold=False)
    lineage = Lineage(plain)
    found = sites(lineage, KINDS)
    if not found:
        raise TaskError("student='width' halves channels, heads and neurons; the network has none that can be cut: use student='depth'.")
    rank = scores(plain, None, "l2")
    dead = {site.axis.name: rank(site).argsort(stable=True)[: site.axis.units // 2].tolist() for site in found}
    made = shrunk(lineage, dead)
    made.origin["pruned"] = {
        "by": "l2",
        "widths": {site.axis.name: f"{site.axis.units} -> {site.axis.units - len(dead[site.axis.name])}" for site in found},
    }
    return made


STUDENTS = {"depth": shallow, "width": narrow}
