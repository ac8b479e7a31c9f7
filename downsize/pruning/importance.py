"""How much the units of an axis matter, by their weights or by gradients through the network."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..network.network import Network
from ..network.rewrite import argument, aten, constant
from ..numerics.importance import Part, geometric_median, magnitude, random, scale, taylor
from ..task import Task
from .sites import Site

# Batches whose gradients are added up, and random directions of the outputs a batch where there are no labels.
BATCHES = 32
DIRECTIONS = 2

Scores = Callable[[Site], Tensor]


def scores(network: Network, task: Task | None, importance: str) -> Scores:
    """What gives the scores of a site's units, [units], higher stays.

    ``taylor`` runs the task's calibration data through the network: the loss is the cross-entropy where the targets are classes, else
    random directions of the outputs (so that the scores add up to a Fisher information of the outputs; Kwon et al. 2022, arXiv 2204.09656).
    """
    if importance in ("l1", "l2"):
        return lambda site: magnitude(parts(network, site), site.axis.units, 1 if importance == "l1" else 2)
    if importance == "geometric_median":
        return lambda site: geometric_median(parts(network, site), site.axis.units)
    if importance == "scale":
        return partial(_scales, network)
    if importance == "taylor":
        assert task is not None  # the technique has checked it
        return _taylor(network, task)
    return lambda site: random(site.axis.units, seed=sum(site.axis.name.encode()))


def parts(network: Network, site: Site, names: set[str] | None = None) -> list[Part]:
    """The tensors that carry a site's axis (of these names), with the unit of each index."""
    carriers = site.axis.carriers.items()
    return [(network.tensor(name), dim, torch.from_numpy(unit)) for (name, dim), unit in carriers if names is None or name in names]


def _scales(network: Network, site: Site) -> Tensor:
    """The gains of the batch norms on the axis; where there are none, all its weights."""
    norms = [node for node in network.graph.nodes if node.target is aten.batch_norm.default]
    gains = [argument(norm, 1, "weight") for norm in norms]
    found = parts(network, site, {str(gain.target) for gain in gains if constant(network, gain) is not None})
    return scale(found, site.axis.units) if found else magnitude(parts(network, site), site.axis.units, 1)


def _taylor(network: Network, task: Task) -> Scores:
    copied = network.copy()
    tensors = {name: tensor.requires_grad_() for name, tensor in copied.named_tensors() if isinstance(tensor, torch.nn.Parameter)}
    batches: list[dict[str, Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for inputs, targets in itertools.islice(task.batches("calibrate"), BATCHES):
        outputs = [one for one in copied.graph_module(*copied.flat(inputs)) if one.is_floating_point()]
        for loss in _losses(outputs, targets, generator):
            found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, allow_unused=True)
            batches.append({name: one for name, one in zip(tensors, found, strict=True) if one is not None})

    def score(site: Site) -> Tensor:
        total = torch.zeros(site.axis.units, dtype=torch.float64)
        for gradients in batches:
            known = parts(copied, site, set(gradients))
            which = [name for name, _ in site.axis.carriers if name in gradients]
            total += taylor(known, [gradients[name] for name in which], site.axis.units)
        return total

    return score


def _losses(outputs: list[Tensor], targets: object, generator: torch.Generator) -> list[Tensor]:
    first = outputs[0]
    if isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point() and first.dim() == 2 and len(first) == len(targets):
        return [functional.cross_entropy(first, targets)]
    return [
        sum((one * torch.randn(one.shape, generator=generator)).sum() for one in outputs)  # type: ignore[misc]
        for _ in range(DIRECTIONS)
    ]
