"""From a network and an amount to the pruned network: order, ladder, allocation, cut, proof, repair."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CutError, TaskError
from ..network.columns import MATRIX_LAYERS
from ..network.cut import Survivors
from ..network.empty import shrunk
from ..network.fold import fold_constants, part_constants
from ..network.judge import Judge, TailJudge
from ..network.lineage import Lineage
from ..network.masked import masked
from ..network.network import Network, batch_of
from ..network.rewrite import argument, aten, constant, drop_identities, fold_batch_norm, fold_padding, set_bias
from ..network.statistics import walk
from ..numerics.allocation import Term
from ..numerics.importance import energy
from ..numerics.removal import Reading
from ..task import Task
from .choice import Amount, choose
from .costs import Costs, evaluate
from .grams import with_grams
from .importance import Scores, scores
from .ladder import Ladder, climb, fold_constant_units, readings, repair_reader, surgeon_order, widths_of, without
from .latency_limit import latency_amount, whole_latency
from .layers import drop_layers
from .pieces import Data, collected
from .refitting import refit_layers
from .renormalise import reestimate_batch_norms
from .sites import Reader, Site, first_reader, in_order, sites

QUANTIZERS = tuple(getattr(torch.ops.downsize, f"fake_quantize{kind}").default for kind in ("", "_dynamic", "_blocks", "_groups", "_levels"))
# What a cut may differ from its mask by, of the outputs' largest value.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """What was asked for; see :class:`~downsize.techniques.prune.Prune`. ``most``: what may remain of ``amount``; ``found``: scores of units
    by name of axis that were found before; axes that have none go by the norms of their weights."""

    amount: str
    most: float
    scope: str
    what: tuple[str, ...]
    importance: str
    refit: bool
    renormalise: bool
    fold: bool
    rounds: int
    multiple: int
    samples: int
    holdout: int
    damping: float
    found: Mapping[str, Tensor] | None = None


# From the network and what may remain to the network with other weights, and scores of the units by name of axis.
Ranking = Callable[[Network, Settings], tuple[Network, Mapping[str, Tensor]]]


def prune(
    network: Network, task: Task, settings: Settings, tune: Callable[[Network], Network] | None = None, ranking: Ranking | None = None
) -> Network:
    """Prune in ``settings.rounds`` steps, each less by the same factor.

    What is trained in between becomes what later steps are repaired towards: the original's layers no longer give what its layers expect.

    Args:
        tune: is given the network behind each step and returns what the next goes on from: the place for training in between.
        ranking: is given the network before each step, and what may remain behind it; the scores that it finds order the units.
    """
    plain = prepared(network, settings.fold)
    data = collected(plain, task, settings.samples, settings.holdout) if settings.samples else None
    whole = _whole(plain, settings, task)
    share = settings.most if settings.most <= 1 else settings.most / whole
    made, rows, given = plain, dict[str, Tensor](), list[str]()
    for step in range(1, settings.rounds + 1):
        left = share ** (1 / settings.rounds) if settings.amount == "ratio" else whole * share ** (step / settings.rounds)
        asked = replace(settings, most=left)
        if ranking:
            made, scored = ranking(made, asked)
            plain, rows, asked = made, {}, replace(asked, found=scored)
        given += give_biases(made) if settings.samples else []
        made = _step(plain, made, task, asked, data, rows)
        if tune:
            drop_zero_biases(made, given)
            made = plain = tune(made)
            rows, given = {}, []
    drop_zero_biases(made, given)
    return made


def ladders_of(network: Network, task: Task, settings: Settings) -> list[Ladder]:
    """What each width of each axis of the network costs in error, without pruning anything."""
    plain = prepared(network, settings.fold)
    data = collected(plain, task, settings.samples, settings.holdout) if settings.samples else None
    lineage = Lineage(plain)
    return climbed(lineage, in_order(plain, sites(lineage, settings.what)), task, settings, data)


def give_biases(network: Network) -> list[str]:
    """Give a bias of zeros to every layer that a repair may shift, so that it is cut with the rest. Returns the layers' names."""
    found = [node for node in network.graph.nodes if node.target in MATRIX_LAYERS and constant(network, node.args[1]) is not None]
    bare = [node for node in found if argument(node, 2, "bias") is None]
    for node in bare:
        weight = network.tensor(str(node.args[1].target))
        set_bias(network, node, weight.new_zeros(weight.shape[0]))
    network.recompile()
    return [node.name for node in bare]


def drop_zero_biases(network: Network, layers: Sequence[str]) -> None:
    """Take the biases of these layers away again where they stayed zero."""
    for node in network.graph.nodes:
        if node.name in layers and not bool(constant(network, node.args[2]).any()):
            node.update_arg(2, None)
    network.recompile()


def prepared(network: Network, fold: bool) -> Network:
    """A fork in evaluation mode and in the plainest form; without ``fold`` it keeps what only training needs: batch norms, dropout.

    Raises:
        CutError: it is quantized.
    """
    made = network.fork().eval()
    if any(node.target in QUANTIZERS for node in made.graph.nodes):
        raise CutError("The network is quantized already, its weights are on grids: prune first, then quantize.")
    fold_constants(made)
    part_constants(made)
    if fold:
        drop_identities(made)
        fold_batch_norm(made)
    fold_padding(made)
    return made


def _step(original: Network, network: Network, task: Task, settings: Settings, data: Data | None, rows: dict[str, Tensor]) -> Network:
    """One round. ``rows``: by layer which of the original's outputs are left, brought up to date here."""
    if "layers" in settings.what:
        assert data is not None  # the technique has checked it
        share = settings.most if settings.amount == "ratio" else settings.most / _whole(network, settings, task)
        return drop_layers(network, settings.amount, share, settings.refit, data)
    lineage = Lineage(network)
    found = in_order(network, sites(lineage, settings.what))
    if not found:
        kinds = ", ".join(sorted({axis.kind for axis in lineage.axes})) or "none"
        raise TaskError(f"Nothing of the kinds {', '.join(settings.what)} can be cut; axes there are of the kinds: {kinds}.")
    ladders = climbed(lineage, found, task, settings, data)
    dead = choose(ladders, amount_of(lineage, found, settings, task), settings.scope)
    made = shrunk(lineage, dead)
    rows |= kept_rows(lineage, Survivors(lineage, dead, allow_empty=True), rows)
    _prove(lineage, dead, made, data)
    if data is not None:
        made = repaired(original, made, lineage, found, dead, settings, data, rows)
    made.origin["pruned"] = _told(lineage, dead, settings)
    return made


# Ladders ----------------------------------------------------------------------------------------------------------------------------


def climbed(lineage: Lineage, found: Sequence[Site], task: Task, settings: Settings, data: Data | None) -> list[Ladder]:
    """The ladder of every site."""
    if data is None:
        return [by_weights(lineage, site, settings) for site in found]
    network = lineage.network
    judge, tail = Judge(network, data.trial), TailJudge(network, data.trial)
    measured = settings.found is None and settings.importance in ("obs", "energy")
    rank = _rank(network, task, settings)
    made = []
    for site, grams in with_grams(network, found, data.fit, data.port):
        reads = readings(site, network, grams)
        order = _order(site, reads, settings) if measured and reads else rank(site).argsort(stable=True)
        if settings.scope == "layer":
            every = _all_widths(site, settings)
            made.append(Ladder(site, order, every, (0.0,) * len(every)))
            continue
        widths = widths_of(site, settings.multiple)
        if site.whole and settings.refit:
            tail.move(first_reader(network, site))
            made.append(climb(site, order, widths, tail, partial(without, network, site, grams, damping=settings.damping)))
        else:
            made.append(climb(site, order, widths, judge, partial(_cut, lineage, site)))
    return made


def _rank(network: Network, task: Task | None, settings: Settings) -> Scores:
    """The scores of units by what was found before, by weights or by gradients."""
    known = settings.found or {}
    rest = scores(network, task, "l2" if settings.importance in ("obs", "energy", "gates") else settings.importance)
    return lambda site: known[site.axis.name] if site.axis.name in known else rest(site)


def _cut(lineage: Lineage, site: Site, gone: Tensor) -> Network:
    return shrunk(lineage, {site.axis.name: gone.tolist()})


def _all_widths(site: Site, settings: Settings) -> tuple[int, ...]:
    """Every width, for the same share of all axes."""
    units = site.axis.units
    grain = settings.multiple if units >= 4 * settings.multiple and site.axis.kind != "heads" else 1
    return tuple(sorted({units, *range(grain, units, grain)}, reverse=True))


def _order(site: Site, reads: Sequence[Reading], settings: Settings) -> Tensor:
    if settings.importance == "obs":
        return surgeon_order(site, reads, settings.damping)
    total = sum(energy(read.gram.diagonal(), read.unit, site.axis.units) * read.importance for read in reads)
    return total.argsort(stable=True)


def by_weights(lineage: Lineage, site: Site, settings: Settings) -> Ladder:
    """The ladder without data: the share of the squared importance that goes stands for the error."""
    value = _rank(lineage.network, None, settings)(site)
    order = value.argsort(stable=True)
    gone = torch.cat([torch.zeros(1, dtype=torch.float64), value[order].square().cumsum(0)])
    widths = widths_of(site, settings.multiple)
    return Ladder(site, order, widths, tuple(float(gone[site.axis.units - width] / gone[-1].clamp(min=1e-30)) for width in widths))


# Cut, proof, repair -----------------------------------------------------------------------------------------------------------------


def _prove(lineage: Lineage, dead: Mapping[str, list[int]], made: Network, data: Data | None) -> None:
    """The law cut == masked, on inputs of the example's size or the first held-back piece.

    Raises:
        CutError: they differ.
    """
    oracle = masked(lineage, dead)
    leaves = data.held[0] if data is not None else _random_inputs(made)
    for one, two in zip(walk(oracle, leaves, {}), walk(made, leaves, {}), strict=True):
        if one.is_floating_point() and one.numel():
            finite = one.isfinite() & two.isfinite()
            gap = float((one - two)[finite].abs().max()) if finite.any() else 0.0
            scale = float(one[finite].abs().max()) if finite.any() else 1.0
            if gap > TOLERANCE * max(scale, 1e-30) or not torch.equal(one.isfinite(), two.isfinite()):
                raise CutError(f"The cut network differs from the masked one by {gap:.3g} of {scale:.3g}, a fault of downsize: please report it.")


def _random_inputs(network: Network) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(port.example, generator=generator).to(port.dtype)
        if port.dtype.is_floating_point
        else torch.randint(0, 2, port.example, generator=generator).to(port.dtype)
        for port in network.ports
    ]


def repaired(
    original: Network,
    made: Network,
    lineage: Lineage,
    found: Sequence[Site],
    dead: Mapping[str, list[int]],
    settings: Settings,
    data: Data,
    rows: Mapping[str, Tensor],
) -> Network:
    """The cut network, its layers fitted to the original's values and its batch norms measured again, each kept if held-back data agrees."""
    judge = Judge(original, data.held)
    loss = judge(made)
    start = shrunk(lineage, dead, without_units(lineage.network, found, dead, settings, data))
    trials = [start]
    if settings.refit:
        trials.append(start.fork())
        here = {node.name for node in start.graph.nodes}
        refit_layers(original, trials[1], data.fit, data.held, rows={name: kept for name, kept in rows.items() if name in here})
    for trial in trials:
        if (lower := judge(trial)) < loss:
            loss, made = lower, trial
    if settings.renormalise and any(node.target is aten.batch_norm.default for node in made.graph.nodes):
        normed = made.fork()
        reestimate_batch_norms(normed, data.fit)
        if (lower := judge(normed)) < loss:
            loss, made = lower, normed
    made.origin["error"] = f"{loss:.4g}"
    return made


def without_units(network: Network, found: Sequence[Site], dead: Mapping[str, list[int]], settings: Settings, data: Data) -> Network:
    """A fork whose readers make up for the units that go: by the optimum for what they read of the others, or (without ``refit``) for those
    that are constant alone, whose part goes into the bias."""
    made = network.fork()
    gone: dict[str, tuple[Reader, Tensor]] = {}
    for site in found:
        for reader in [reader for reader in site.readers if reader.own]:
            mask = torch.isin(reader.unit, torch.tensor(dead.get(site.axis.name, []), dtype=torch.int64))
            gone[reader.node] = reader, mask | (gone[reader.node][1] if reader.node in gone else mask)
    for _, grams in with_grams(network, [site for site in found if site.axis.name in dead], data.fit, data.port):
        for name, gram in grams.items():
            if name in gone:
                reader, mask = gone.pop(name)
                if settings.refit:
                    repair_reader(made, reader, gram, mask, settings.damping)
                else:
                    fold_constant_units(made, reader, gram, mask)
    made.recompile()
    return made


def kept_rows(lineage: Lineage, survivors: Survivors, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each layer that has lost outputs, now or before, which of the original's are left."""
    rows = {}
    for node in lineage.network.graph.nodes:
        if node.target in MATRIX_LAYERS and node.args[1].op == "get_attr":
            alive = torch.from_numpy(survivors.of(lineage.dims[node.args[1]][0]))
            if node.name in before:
                rows[node.name] = before[node.name][alive]
            elif not bool(alive.all()):
                rows[node.name] = alive.nonzero()[:, 0]
    return rows


def _told(lineage: Lineage, dead: Mapping[str, list[int]], settings: Settings) -> dict[str, Any]:
    """What was done, for reports: axis -> units before and after."""
    widths = {axis.name: f"{axis.units} -> {axis.units - len(dead[axis.name])}" for axis in lineage.axes if axis.name in dead}
    how = settings.importance if settings.samples else f"{settings.importance} without data: nothing was measured, nothing repaired"
    return {"by": how, "widths": widths}


# Amounts ----------------------------------------------------------------------------------------------------------------------------


def amount_of(lineage: Lineage, found: Sequence[Site], settings: Settings, task: Task) -> Amount:
    """What was asked for, as a function of widths."""
    costs = Costs(lineage, [site.axis for site in found])
    if settings.amount == "ratio":
        units = [site.axis.units for site in found]
        terms = lambda widths: tuple(Term((i,), width * units[i]) for i, width in enumerate(widths))  # noqa: E731
        return Amount("units", settings.most * sum(units), terms, lambda dead: settings.most * sum(units))
    if settings.amount == "latency":
        return latency_amount(lineage, found, settings.most, task.clock, batch_of(task.example, [0]))
    polynomial = costs.macs if settings.amount == "macs" else costs.parameters

    def real(dead: dict[str, list[int]]) -> float:
        smaller = Costs(Lineage(shrunk(lineage, dead)), ())
        return evaluate(smaller.macs if settings.amount == "macs" else smaller.parameters, ())

    return Amount(settings.amount, settings.most, lambda widths: costs.terms(polynomial, widths), real)


def _whole(network: Network, settings: Settings, task: Task) -> float:
    """What all of the network has of the amount."""
    if settings.amount == "ratio":
        return 1.0
    if settings.amount == "latency":
        return whole_latency(network, task.clock, batch_of(task.example, [0]))
    costs = Costs(Lineage(network), ())
    return evaluate(costs.macs if settings.amount == "macs" else costs.parameters, ())
