"""Costs as polynomials of widths: at full width what network/cost.py counts by running, and at others the recount of the network really cut."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN, FusedAttention
from captures import architecture, form
from forms import FORMS, conv
from small_nets import Net
from torch import nn
from zoo import floats, images

from downsize.network.capture import capture
from downsize.network.cost import COUNTED, count
from downsize.network.cut import cut
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.numerics.allocation import Term
from downsize.pruning.costs import SIZES, Costs, Polynomial, evaluate, macs_of, product, total

FAST = ("squeeze_excite", "resnext", "bidirectional_gru", "fused_qkv_vit", "conv3d")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


def captured(model: nn.Module, inputs: Any) -> Network:
    torch.set_num_threads(1)
    return capture(model.eval(), inputs)


def counted(network: Network, inputs: Any) -> tuple[int, int]:
    cost = count(network, inputs)
    return cost.macs, sum(t.numel() for t in {id(t): t for _, t in network.named_tensors() if isinstance(t, nn.Parameter)}.values())


def evaluated(costs: Costs, widths: Any) -> tuple[float, float]:
    return evaluate(costs.macs, widths), evaluate(costs.parameters, widths)


# The arithmetic ----------------------------------------------------------------------------------------------------------------------


def test_sums_and_products_of_polynomials_are_those_of_their_values():
    one: Polynomial = {(): 2.0, (0,): 3.0, (0, 1): 5.0}
    two: Polynomial = {(): 1.0, (1,): 4.0}
    for widths in ((1.0, 1.0), (0.5, 0.25), (0.0, 1.0), (0.3, 0.7)):
        a, b = evaluate(one, widths), evaluate(two, widths)
        assert evaluate(total([one, two]), widths) == pytest.approx(a + b)
        assert evaluate(product([one, two]), widths) == pytest.approx(a * b)
        assert evaluate(product([two, two, two]), widths) == pytest.approx(b**3)
    assert product([]) == {(): 1.0} and total([]) == {}


def test_a_chain_of_layers_in_closed_form():
    network = captured(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), floats(6)(2))
    lineage = Lineage(network)
    costs = Costs(lineage, lineage.axes)
    assert costs.macs == {(0,): 2 * 6 * 8, (0, 1): 2 * 8 * 5, (1,): 2 * 5 * 3}
    assert costs.parameters == {(0,): 6 * 8 + 8, (0, 1): 8 * 5, (1,): 5 + 5 * 3, (): 3}


def test_a_convolution_of_a_concatenation_in_closed_form():
    parts = {"a": conv(3, 4), "b": conv(3, 6), "c": conv(13, 5, 1, bias=False)}
    network = captured(Net(lambda n, x: n.c(torch.cat([n.a(x), x, n.b(x)], 1)), **parts), images(3, 8)(2))
    lineage = Lineage(network)
    costs, places = Costs(lineage, [lineage.axis("a"), lineage.axis("b")]), 2 * 64
    assert costs.macs == {(0,): places * (27 * 4 + 4 * 5), (1,): places * (27 * 6 + 6 * 5), (): places * 3 * 5}


def test_a_depthwise_layer_grows_with_its_width_not_with_its_square():
    network = captured(nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 4, 1)), images(3, 8)(2))
    lineage = Lineage(network)
    assert set(Costs(lineage, lineage.axes).macs) == {(0,)}


def test_heads_and_head_dims_multiply():
    network = captured(Net(lambda n, x: n.a(x), a=FusedAttention(16, 4)), floats(5, 16)(2))
    lineage = Lineage(network)
    heads, dims = (next(axis for axis in lineage.axes if axis.kind == kind) for kind in ("heads", "head_dims"))
    costs = Costs(lineage, [heads, dims])
    rows, scores = 2 * 5, 2 * 4 * 5 * 5
    assert costs.macs == {(0, 1): rows * 16 * 48 + scores * 8 + rows * 16 * 16}
    assert costs.parameters == {(0, 1): 16 * 48 + 48 + 16 * 16, (): 16}


def test_a_shared_tensor_counts_once_and_its_use_twice():
    shared = nn.Linear(8, 8)
    network = captured(nn.Sequential(nn.Linear(6, 8), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 3)), floats(6)(2))
    lineage = Lineage(network)
    costs = Costs(lineage, ())
    assert evaluated(costs, ()) == counted(network, floats(6)(2)) == (2 * (48 + 64 + 64 + 24), 48 + 8 + 64 + 8 + 24 + 3)


def test_every_operator_that_counts_has_a_formula():
    assert {target._schema.name.split("::")[1] for target in COUNTED} == set(SIZES)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "function",
    [
        lambda n, x: torch.einsum("...i,oi->...o", n.one(x), n.two.weight),
        lambda n, x: torch.einsum("bi->b", n.one(x))[:, None] * x,
        lambda n, x: torch.einsum("bi,ji->bj", n.one(x), n.two.weight) + torch.outer(x[:, 0], torch.ones(3)),
        lambda n, x: n.two(n.one(x)) + torch.addmm(n.two.bias, n.one(x), n.two.weight.t()) + torch.mm(n.one(x), n.two.weight.t()),
    ],
    ids=["dots", "one operand", "outer", "addmm and mm"],
)
def test_products_of_every_form_are_counted_as_by_running(function):
    network = captured(Net(function, one=nn.Linear(6, 8), two=nn.Linear(8, 3)), floats(6)(2))
    assert_counts(network, floats(6)(2))


def test_terms_are_the_polynomial_over_levels():
    lineage = Lineage(captured(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), floats(6)(2)))
    costs = Costs(lineage, lineage.axes)
    widths = [np.array([1.0, 0.5, 0.25]), np.array([1.0, 0.6])]

    def value(terms: tuple[Term, ...], levels: tuple[int, int]) -> float:
        return sum(float(term.table[tuple(levels[choice] for choice in term.choices)]) for term in terms)

    terms = costs.terms(costs.macs, widths)
    for i, one in enumerate(widths[0]):
        for j, two in enumerate(widths[1]):
            assert value(terms, (i, j)) == pytest.approx(evaluate(costs.macs, (one, two)))


def test_terms_of_three_axes_never_count_too_little():
    lineage = Lineage(captured(Net(lambda n, x: n.a(x), a=FusedAttention(16, 4)), floats(5, 16)(2)))
    costs = Costs(lineage, ())
    widths = [np.array([1.0, 0.5, 0.25]), np.array([1.0, 0.5]), np.array([1.0, 0.7])]
    (term,) = costs.terms({(0, 1, 2): 8.0}, widths)
    assert set(term.choices) == {0, 1} and term.table == pytest.approx(8 * np.outer(widths[0], widths[1]))
    (square,) = costs.terms({(0, 0): 8.0}, widths)
    assert square.choices == (0,) and square.table == pytest.approx(8 * widths[0] ** 2)


# Whole networks ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_full_width_is_what_running_counts_and_a_cut_what_its_recount_does(name):
    assert_counts(architecture(name)[1], ARCHITECTURES[name].inputs(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_counted_as_it_is_recounted(name):
    assert_counts(form(name), FORMS[name][0].inputs(2))


def assert_counts(network: Network, inputs: Any) -> None:
    """The recount is of the same cut: an axis all of whose units are alike, with some of them gone; of many such axes six, at random."""
    lineage = Lineage(network)
    axes = [axis for axis in lineage.axes if axis.units > 1]
    costs, rng = Costs(lineage, axes), random.Random(3)
    assert evaluated(costs, [1.0] * len(axes)) == pytest.approx(counted(network, inputs), rel=1e-9)
    assert not costs.left_out and macs_of(network) == pytest.approx(counted(network, inputs)[0])
    alike = [(number, axis) for number, axis in enumerate(axes) if all(map(_is_even, axis.carriers.values()))]
    for number, axis in rng.sample(alike, min(6, len(alike))):
        left = rng.randint(1, axis.units - 1)
        widths = [1.0] * len(axes)
        widths[number] = left / axis.units
        made = cut(lineage, {axis.name: rng.sample(range(axis.units), axis.units - left)})
        assert evaluated(costs, widths) == pytest.approx(counted(made, inputs), rel=1e-9), axis.name


def _is_even(units: np.ndarray) -> bool:
    """Whether each unit has as many positions as any other."""
    return len(set(np.unique(units[units >= 0], return_counts=True)[1].tolist())) == 1


def test_the_hand_written_are_all_there():
    assert set(FAST) <= {one.name for one in HAND_WRITTEN}
