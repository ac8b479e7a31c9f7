"""From a network and an amount to the network with factors: what each way costs and loses, the choice, the factors in the graph, repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from ..errors import AllocationError, CutError, TaskError
from ..network.judge import Judge
from ..network.network import Network
from ..pruning.pieces import Data, collected
from ..pruning.refitting import refit_layers
from ..pruning.structure import QUANTIZERS, prepared
from ..task import Task
from .anchoring import anchored
from .costs import Costs
from .forms import Decomposed
from .ladder import Asked, Knowledge, Site, climbed
from .layers import joined, layers_of, say_as_linear
from .options import Option, Way, by_error, by_program, by_share, cost_of
from .rewriting import Product, put

NAMED = 4  # layers that a message names


@dataclass(frozen=True)
class Settings:
    """What was asked for; see :class:`~downsize.techniques.factorize.Factorize`. ``most``: what may remain of ``amount``, None where the
    ranks follow from the weights."""

    amount: str
    most: float | None
    ranks: str
    energy: float
    forms: tuple[str, ...]
    what: tuple[str, ...]
    multiple: int
    samples: int
    holdout: int
    refit: bool
    joint: bool
    damping: float
    fold: bool


def factorize(network: Network, task: Task, settings: Settings) -> Network:
    """The network with factors in the place of the layers chosen.

    Raises:
        CutError: the network is quantized. TaskError: nothing can be factored, or there is too little data.
        AllocationError: so little cannot remain.
    """
    work = _prepared(network, task, settings)
    own, refused = _chosen(work, settings)
    made = work.network.fork()
    if own:
        put(made, [product for products in own.values() for product in products])
        if work.data is not None:
            made = _repaired(work, made, own, settings)
    made.origin["factorized"] = _told(work, own, refused, settings)
    return made


def ladder_of(network: Network, task: Task, settings: Settings) -> list[list[Way]]:
    """For each site (a layer, or layers that read the same value) the ways that are worth something, the dearest first. Nothing is changed."""
    work = _prepared(network, task, settings)
    return climbed(work.network, work.known.of(work.sites), work.costs, work.asked, work.data)[0]


def ready(network: Network, settings: Settings) -> Network:
    """A fork in which layers can be found and replaced, in the plainest form; without ``fold`` it keeps what only training needs.

    Raises:
        CutError: the network is quantized.
    """
    if any(node.target in QUANTIZERS for node in network.graph.nodes):
        raise CutError("The network is quantized already, its weights are on grids: factorize first, then quantize.")
    plain = prepared(network, settings.fold)
    say_as_linear(plain)
    return plain


def nearest(network: Network, task: Task, settings: Settings) -> tuple[list[Product], dict[str, Any]]:
    """The factors that are nearest to the weights as they are, forms and ranks chosen under what may remain, and what to tell of them.

    No data is used, and nothing is changed; the network is one that :func:`ready` gave, or was trained from it.

    Raises:
        TaskError: nothing can be factored. AllocationError: so little cannot remain.
    """
    settings = replace(settings, samples=0, refit=False, fold=False)
    work = _prepared(network, task, settings)
    own, refused = _chosen(work, settings)
    return [product for products in own.values() for product in products], _told(work, own, refused, settings)


@dataclass(frozen=True, eq=False)
class _Work:
    """What is worked on: a plain fork of the network, what can be factored in it and why the rest cannot, and what may remain."""

    network: Network
    sites: list[Site]
    left: dict[str, str]
    costs: Costs
    asked: Asked
    data: Data | None
    known: Knowledge
    whole: float
    most: float


def _prepared(network: Network, task: Task, settings: Settings) -> _Work:
    plain = ready(network, settings)
    found, left = layers_of(plain, settings.what)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or f"it has no layers of the kinds {', '.join(settings.what)}"
        raise TaskError(f"Nothing can be factored: {reasons}.")
    data = collected(plain, task, settings.samples, settings.holdout) if settings.samples else None
    costs = Costs(plain, task, settings.amount)
    whole = costs.whole(plain)
    most = inf if settings.most is None else settings.most if settings.most > 1 else settings.most * whole
    judged = settings.ranks == "ladder" and settings.amount != "ratio" and data is not None
    asked = Asked(settings.forms, settings.multiple, settings.joint, settings.damping, judged, settings.ranks == "evbmf")
    sites = joined(plain, found)
    return _Work(plain, sites, left, costs, asked, data, Knowledge(plain, sites, settings.damping, data), whole, most)


def _unfactored(work: _Work, rest: float) -> str:
    """What of the whole amount no factors can lower, and the layers in it that were looked at."""
    named = [f"{name}: {reason}" for name, reason in list(work.left.items())[:NAMED]]
    more = f"; and {len(work.left) - NAMED} more" if len(work.left) > NAMED else ""
    return f"Of all {work.whole:.6g}, {rest:.6g} are where no factors can stand{' (' + '; '.join(named) + more + ')' if named else ''}."


def _chosen(work: _Work, settings: Settings) -> tuple[dict[Option, list[Product]], dict[str, str]]:
    """The options taken, without the layers that stay as they are, with what takes these layers' places; and where no factors pay."""
    ways, refused = climbed(work.network, work.known.of(work.sites), work.costs, work.asked, work.data)
    if settings.ranks == "energy":
        taken = by_error(ways, 1 - settings.energy)
    elif settings.ranks == "evbmf":
        taken = [option for each in ways for option in min(each, key=cost_of)]
    elif settings.amount == "ratio":
        assert settings.most is not None  # the technique has checked it
        taken = by_share(ways, settings.most)
    else:
        rest = work.whole - sum(work.costs.dense(*site) for site in work.sites)
        try:
            taken = by_program(ways, settings.amount, work.most, rest)
        except AllocationError as error:
            raise AllocationError(f"{error} {_unfactored(work, rest)}" if rest else str(error)) from error
    return _products(work, [option for option in taken if option.form != "dense"]), refused


def _products(work: _Work, options: Sequence[Option]) -> dict[Option, list[Product]]:
    """What takes the layers' places, made from what they read in the network as it is."""
    found: dict[Option, list[Product]] = {}
    touched = [site for site in work.sites if any(set(option.layers) & set(site) for option in options)]
    for site, known in work.known.of(touched):
        for option in options:
            if set(option.layers) <= set(site):
                made = Decomposed(option.layers, [layer.dense.weight for layer in option.layers], known, (option.form,))
                found[option], _ = made.products(option.form, option.ranks)
    return found


def _repaired(work: _Work, made: Network, own: Mapping[Option, Sequence[Product]], settings: Settings) -> Network:
    """The network with factors, or one whose layers were fitted one after another, if that is nearer to the original on held-back data."""
    assert work.data is not None  # else nothing is repaired
    judge = Judge(work.network, work.data.held)
    loss = judge(made)
    trials: list[Network] = []
    if settings.refit:
        trials.append(anchored(work.network, own, work.data, settings.damping)[0])
        trials.append(trials[0].fork())
        refit_layers(work.network, trials[1], work.data.fit, work.data.held)
    for trial in trials:
        # A layer that had no bias may have got one.
        within = settings.amount == "latency" or work.costs.whole(trial) <= max(work.most, work.costs.whole(made))
        if within and (lower := judge(trial)) < loss:
            loss, made = lower, trial
    made.origin["error"] = f"{loss:.4g}"
    return made


def _told(work: _Work, own: Mapping[Option, Sequence[Product]], refused: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """What was done, for reports: each layer's form and ranks, its own error, and its cost (of several together: of all) before and after."""
    told: dict[str, Any] = {"by": settings.ranks if settings.samples else f"{settings.ranks} without data: nothing was measured"}
    for option in own:
        before = work.costs.dense(*option.layers)
        note = f"{option}, error {option.own:.3g}, {settings.amount} {before:.6g} -> {option.cost:.6g}"
        others = len({layer.name for layer in option.layers}) - 1
        note += f", together with {others} more" if others else ""
        told |= {layer.name: note for layer in option.layers}
    return dict(refused) | told | {name: f"left: {reason}" for name, reason in work.left.items()}
