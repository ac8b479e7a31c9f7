"""Judging by the tail, repaired readers, emptied sub-layers, and the choice of widths, each against a plainer way to the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from zoo import BY_NAME, specimen

from downsize.errors import AllocationError, CutError
from downsize.network.cut import cut
from downsize.network.empty import can_empty, emptied
from downsize.network.judge import Judge, TailJudge
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.numerics.allocation import Term
from downsize.pruning.choice import Amount, choose
from downsize.pruning.grams import gram_matrices, with_grams
from downsize.pruning.ladder import Ladder, climb, widths_of, without
from downsize.pruning.sites import Site, first_reader, in_order, sites
from downsize.testing import cut_equals_masked, loaded_equals_live

NAMES = ("residual", "dense", "squeeze_excite", "vit", "encoder")


def setting(name: str) -> tuple[Network, Lineage, list[Site], list[list[Any]]]:
    torch.manual_seed(0)
    network = specimen(name)[1].fork()
    lineage = Lineage(network)
    pieces = [network.flat(BY_NAME[name].inputs(batch)) for batch in (2, 3, 4)]
    return network, lineage, in_order(network, sites(lineage)), pieces


@pytest.mark.parametrize("name", NAMES)
def test_the_tail_judges_as_the_whole_does(name: str):
    """Oracle: the judge that runs everything; bit-equal. The cut network gives what the one with zero columns does."""
    network, lineage, found, pieces = setting(name)
    whole, tail = Judge(network, pieces), TailJudge(network, pieces)
    seen = 0
    for site, grams in with_grams(network, found, pieces, None):
        gone = torch.arange(site.axis.units // 2)
        if not site.whole:
            continue
        made = without(network, site, grams, gone, damping=0.01)
        tail.move(first_reader(network, site))
        assert tail(made) == whole(made) > 0
        assert tail(network) == 0
        smaller = cut(lineage, {site.axis.name: gone.tolist()}, made)
        for one, two in zip(walk(made, pieces[0], {}), walk(smaller, pieces[0], {}), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
        seen += 1
    assert seen


def test_gram_matrices_are_products_of_inputs():
    """Oracle: X X^T of the inputs that a hook sees, with a row of ones."""
    network, _, _, pieces = setting("vit")
    layer = next(node for node in network.graph.nodes if str(node.target) == "aten.linear.default")
    seen: list[torch.Tensor] = []
    for leaves in pieces:
        walk(network, leaves, {layer: lambda args, value: seen.append(args[0].reshape(-1, args[0].shape[-1]))})
    inputs = torch.cat(seen).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    found = gram_matrices(network, [layer], pieces, None)[layer.name][0]
    assert torch.allclose(found, inputs.T @ inputs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "encoder", "residual"])
def test_an_emptied_sub_layer_leaves_its_bias(name: str):
    """Oracle: the full graph whose readers read zeros."""
    network, lineage, _, _ = setting(name)
    done = 0
    for axis in lineage.axes:
        if can_empty(lineage, axis):
            made = cut_equals_masked(network, {axis.name: range(axis.units)}, BY_NAME[name].inputs(2))
            assert len(list(made.graph.nodes)) < len(list(network.graph.nodes))
            loaded_equals_live(made, BY_NAME[name].inputs(2))
            done += 1
        else:
            with pytest.raises(CutError, match="cannot lose its last unit"):
                emptied(lineage, axis.name)
    assert done or name == "residual"


def test_widths_are_falling_multiples():
    _, _, found, _ = setting("encoder")
    neurons = next(site for site in found if site.axis.kind == "neurons")
    heads = next(site for site in found if site.axis.kind == "heads")
    assert neurons.axis.units == 32 and heads.axis.units == 4
    assert widths_of(neurons, 8) == (32, 24, 16, 8, 0)
    assert widths_of(heads, 8)[:4] == (4, 3, 2, 1)
    assert not any(width % 4 for width in widths_of(neurons, 4))


def test_a_ladder_stops_where_the_network_is_lost():
    _, _, found, _ = setting("encoder")
    errors = iter([0.1, 0.05, 1.5])
    ladder = climb(found[0], torch.arange(found[0].axis.units), (4, 3, 2, 1, 0), lambda made: next(errors), lambda gone: made_of(gone))
    assert ladder.errors == (0.0, 0.1, 0.1, 1.5, float("inf"))
    assert ladder.dead(2) == [*range(found[0].axis.units - 2)]


def made_of(gone: torch.Tensor) -> Any:
    return gone


def three_axes() -> tuple[list[Ladder], Any, Callable[[dict[str, list[int]]], float]]:
    """Ladders with random errors, terms of a cost that is a product of two widths and a sum, and that cost of what is left."""
    _, _, found, _ = setting("encoder")
    generator = np.random.default_rng(0)
    ladders = []
    for site in found[:3]:
        widths = widths_of(site, 4)
        errors = np.concatenate([[0.0], np.sort(generator.uniform(0, 1, len(widths) - 1))])
        ladders.append(Ladder(site, torch.arange(site.axis.units), widths, tuple(errors.tolist())))

    def terms(widths: Any) -> tuple[Term, ...]:
        return Term((0, 1), 10 * np.multiply.outer(widths[0], widths[1])), Term((2,), 5 * widths[2]), Term((), np.asarray(1.0))

    return ladders, terms, lambda dead: cost([1 - len(dead.get(ladder.site.axis.name, [])) / ladder.site.axis.units for ladder in ladders])


def cost(shares: Sequence[float]) -> float:
    return float(10 * shares[0] * shares[1] + 5 * shares[2] + 1)


def loss(ladders: Sequence[Ladder], dead: dict[str, list[int]]) -> float:
    """The summed error of what ``choose`` gave."""
    levels = [ladder.widths.index(ladder.site.axis.units - len(dead.get(ladder.site.axis.name, []))) for ladder in ladders]
    return sum(ladder.errors[level] for ladder, level in zip(ladders, levels, strict=True))


def least_loss(ladders: Sequence[Ladder], most: float, real: Callable[[float], float] = float) -> float:
    """By trying all combinations of levels."""
    return min(
        sum(ladder.errors[level] for ladder, level in zip(ladders, levels, strict=True))
        for levels in itertools.product(*(range(len(ladder.widths)) for ladder in ladders))
        if real(cost([ladder.widths[level] / ladder.site.axis.units for ladder, level in zip(ladders, levels, strict=True)])) <= most
    )


def test_widths_are_chosen_as_by_brute_force():
    """Oracle: all combinations of levels, with a cost that is a product of two widths and a sum."""
    ladders, terms, real = three_axes()
    dead = choose(ladders, Amount("cost", 8.0, terms, real), "global")
    assert real(dead) <= 8.0
    assert loss(ladders, dead) == pytest.approx(least_loss(ladders, 8.0), rel=2e-3)


def test_a_limit_is_met_where_the_real_cost_is_a_staircase_that_the_terms_do_not_show():
    """As measured latency is: steps of a sixteenth of the limit, each a little above it. Oracle: all combinations, with a step less to spend."""
    ladders, terms, real = three_axes()

    def stairs(value: float) -> float:
        return ceil(value / 0.5) * 0.5 + 0.02

    for most in (8.0, 7.67, 6.93, 5.0, 4.0):
        seen: list[tuple[float, dict[str, list[int]]]] = []

        def measured(dead: dict[str, list[int]], seen: list[tuple[float, dict[str, list[int]]]] = seen) -> float:
            seen.append((stairs(real(dead)), dead))
            return seen[-1][0]

        dead = choose(ladders, Amount("latency", most, terms, measured), "global")
        assert stairs(real(dead)) <= most
        assert loss(ladders, dead) <= least_loss(ladders, most - 0.5, stairs) + 1e-9
        assert loss(ladders, dead) == min(loss(ladders, other) for value, other in seen if value <= most)
    with pytest.raises(AllocationError, match="the widths found leave 1000, more than 4; ask for a little less"):
        choose(ladders, Amount("latency", 4.0, terms, lambda dead: 1000.0), "global")
