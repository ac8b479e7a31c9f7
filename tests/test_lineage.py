"""What can be cut of known networks: names, kinds and sizes of axes, what carries them, what is frozen and why, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import FusedAttention, GatedPerceptron, SqueezeExcite, vivid
from forms import attended, conv, projections
from small_nets import Net, weight
from torch import nn
from zoo import Recurrent, Tied, block, floats, head, images, tokens

from downsize.errors import CutError
from downsize.network.capture import capture
from downsize.network.cut import Survivors, cut
from downsize.network.lineage import Axis, Lineage, axes
from downsize.network.masked import masked
from downsize.network.network import Network


def captured(model: nn.Module, inputs: Any) -> Network:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return capture(vivid(model).eval(), inputs)


def found(model: nn.Module, inputs: Any) -> dict[str, tuple[str, int, bool]]:
    return {axis.name: (axis.kind, axis.units, axis.exact) for axis in axes(captured(model, inputs))}


VECTORS, SEQUENCE, PICTURE = floats(6)(2), floats(5, 12)(2), images(3, 8)(2)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


# Names, kinds, carriers --------------------------------------------------------------------------------------------------------------


def test_neurons_are_named_by_the_layer_that_makes_them():
    assert found(perceptron(), VECTORS) == {"0": ("neurons", 8, True), "2": ("neurons", 5, True)}


def test_channels_of_a_residual_stream_are_one_axis():
    model = Net(
        lambda net, x: net.last(net.stem(x) + net.two(net.one(net.stem(x)))), stem=block(3, 8), one=block(8, 12), two=block(12, 8), last=head(8)
    )
    assert found(model, PICTURE) == {"stem.0": ("channels", 8, True), "one.0": ("channels", 12, True)}


def test_heads_and_what_is_in_them():
    expected = {"q.heads": ("heads", 4, True), "q.head_dims": ("head_dims", 4, True), "v.head_dims": ("head_dims", 6, True)}
    assert found(Net(attended, **projections()), SEQUENCE) == expected


def test_a_stream_that_is_normed_is_an_inexact_width():
    model = Net(lambda net, x: net.two(net.norm(net.one(x))), one=nn.Linear(6, 8), norm=nn.LayerNorm(8), two=nn.Linear(8, 3))
    ((kind, units, exact),) = found(model, VECTORS).values()
    assert (kind, units, exact) == ("width", 8, False)


def test_two_axes_of_one_module_are_numbered():
    model = Net(lambda net, x: net.two(net.norm(net.one(x))), one=conv(3, 16), norm=nn.GroupNorm(4, 16), two=conv(16, 4))
    assert found(model, PICTURE) == {"one": ("channels", 4, True), "one#2": ("width", 4, False)}


def test_carriers_tell_the_unit_of_every_position():
    axis = axes(captured(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 64, 3)), PICTURE))[0]
    vector = np.arange(8)
    expected = {
        ("0.weight", 0): vector,
        ("0.bias", 0): vector,
        **{(f"1.{name}", 0): vector for name in ("weight", "bias", "running_mean", "running_var")},
    }
    assert set(axis.carriers) == {*expected, ("3.weight", 1)}
    assert all((axis.carriers[key] == value).all() for key, value in expected.items())
    assert (axis.carriers["3.weight", 1] == np.repeat(vector, 64)).all()


def test_carriers_of_concatenated_parts_are_partial():
    model = Net(lambda net, x: net.c(torch.cat([net.a(x), x, net.b(x)], 1)), a=nn.Linear(6, 4), b=nn.Linear(6, 5), c=nn.Linear(15, 3))
    a, b = axes(captured(model, VECTORS))
    assert a.carriers["c.weight", 1].tolist() == [*range(4), *[-1] * 11]
    assert b.carriers["c.weight", 1].tolist() == [*[-1] * 10, *range(5)]


def test_carriers_of_gated_layers_hold_each_unit_twice():
    axis = axes(captured(GatedPerceptron(), floats(12)(2)))[0]
    assert axis.carriers["one.weight", 0].tolist() == [*range(16)] * 2


def test_a_tied_embedding_is_one_axis():
    """The embedding, which is the last layer's weight too, and the block behind it that runs twice."""
    (axis,) = axes(captured(Tied(), tokens()(2)))
    assert axis.units == 12 and {dim for _, dim in axis.carriers} == {0, 1} and len(axis.carriers) == 4


def test_recurrent_units_are_carried_once_a_gate():
    network = captured(Recurrent(nn.LSTM), floats(7, 6)(2))
    axis = next(axis for axis in axes(network) if any("weight_hh" in name for name, _ in axis.carriers))
    name = next(name for name, dim in axis.carriers if "weight_hh" in name)
    assert axis.carriers[name, 0].tolist() == [*range(axis.units)] * 4 and axis.carriers[name, 1].tolist() == [*range(axis.units)]


def test_axes_are_the_same_whenever_they_are_looked_for():
    network = captured(FusedAttention(16, 4), floats(5, 16)(2))

    def told(axis: Axis) -> tuple[Any, ...]:
        return axis.name, axis.kind, axis.atoms.tolist(), {key: units.tolist() for key, units in axis.carriers.items()}

    assert [told(axis) for axis in axes(network)] == [told(axis) for axis in axes(network)]


# What stays --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x.softmax(1),
        lambda x: x.cumsum(1),
        lambda x: x.amax(1, keepdim=True) + x,
        lambda x: x.roll(1, 1),
        lambda x: x[:, [7, 6, 5, 4, 3, 2, 1, 0]],
        lambda x: x[:, ::2].repeat(1, 2),
        lambda x: x + torch.arange(8),
        lambda x: x.sort(1)[0],
        lambda x: x / x.std(1, keepdim=True),
        lambda x: x @ torch.eye(8),
        lambda x: F.max_pool1d(x[:, None], 3, 1, 1)[:, 0],
    ],
    ids=["softmax", "cumsum", "amax", "roll", "index", "steps", "arange", "sort", "std", "eye", "pool"],
)
def test_what_depends_on_all_positions_or_on_where_they_stand_is_frozen(operator):
    model = Net(lambda net, x: net.two(operator(net.one(x))), one=nn.Linear(6, 8), two=nn.Linear(8, 3))
    assert not [axis for axis in axes(captured(model, VECTORS)) if axis.units > 1]


@pytest.mark.parametrize(
    ("operator", "name"),
    [(lambda x: x.topk(8, 1)[0], "topk"), (lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 4, 2))).flatten(1), "view_as_complex"),
     (lambda x: x.scatter(1, torch.zeros(1, 8, dtype=torch.long).expand(x.shape[0], -1), 0.5), "scatter"), (lambda x: x.tile(1, 1), "tile")],
)  # fmt: skip
def test_operators_without_a_rule_freeze_and_are_named(operator, name):
    model = Net(lambda net, x: net.two(operator(net.one(x))), one=nn.Linear(6, 8), two=nn.Linear(8, 3))
    lineage = Lineage(captured(model, VECTORS))
    assert not lineage.axes and name in lineage.frozen_by and lineage.coverage() == 0


def test_inputs_and_outputs_stay():
    assert not axes(captured(nn.Linear(6, 8), VECTORS))
    model = Net(lambda net, x: (net.two(net.one(x)), net.one(x)), one=nn.Linear(6, 8), two=nn.Linear(8, 3))
    assert not axes(captured(model, VECTORS))


def test_the_position_that_is_selected_stays():
    model = Net(lambda net, x: net.two(net.one(x)) * net.one(x)[:, -3:-2] + net.one(x)[:, 1, None], one=nn.Linear(6, 8), two=nn.Linear(8, 3))
    (axis,) = axes(captured(model, VECTORS))
    assert axis.carriers["one.weight", 0].tolist() == [0, -1, 1, 2, 3, -1, 4, 5]


def test_coverage_counts_the_elements_that_some_axis_carries():
    lineage = Lineage(captured(perceptron(), VECTORS))
    stays = 3  # the last bias
    total = 8 * 6 + 8 + 5 * 8 + 5 + 3 * 5 + 3
    assert lineage.coverage() == pytest.approx((total - stays) / total)
    gated = SqueezeExcite()
    assert 0.9 < Lineage(captured(gated, images()(2))).coverage() < 1


def test_coverage_is_none_where_units_can_only_go_together():
    """A matrix of inner products, read whole: a pair needs two units of one axis, so that all are tied."""
    model = Net(lambda net, x: net.two((net.one(x) @ net.one(x).mT).flatten(1)), one=nn.Conv1d(3, 6, 3), two=nn.Linear(36, 4))
    lineage = Lineage(captured(model, floats(3, 9)(2)))
    assert [axis.units for axis in lineage.axes] == [1] and lineage.coverage() == 0


# Other sizes -------------------------------------------------------------------------------------------------------------------------


def test_units_that_meet_only_at_another_batch_size_are_tied():
    """The batch is moved behind units by a view: with 4 samples rows are whole sets of units, with others they are not."""
    model = Net(lambda net, x: net.two(net.one(x).reshape(-1).view(4, 2 * x.shape[0]).sum(0).view(x.shape[0], 2)), one=nn.Linear(6, 8),
                two=nn.Linear(2, 3))  # fmt: skip
    lineage = Lineage(captured(model, floats(6)(4)))
    for axis in lineage.axes:
        for unit in range(axis.units if axis.units > 1 else 0):
            made, oracle = cut(lineage, {axis.name: [unit]}), masked(lineage, {axis.name: [unit]})
            for batch in (1, 3, 4):
                torch.testing.assert_close(made.predict(floats(6)(batch)), oracle.predict(floats(6)(batch)))


def test_a_dimension_that_follows_the_batch_is_not_counted_along():
    """Heads around the batch, taken apart by chunk: its parts would be spelled for one batch size."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.one(x).view(x.shape[0], 4, 3).transpose(0, 1).reshape(4 * x.shape[0], 3)
        return net.two(torch.cat(y.chunk(4, 0), -1))

    network = captured(Net(forward, one=nn.Linear(6, 12), two=nn.Linear(12, 5)), VECTORS)
    assert [(axis.units, axis.exact) for axis in axes(network)] == [(3, True)]
    (axis,) = axes(network)
    for batch in (1, 3):
        x = floats(6)(batch)
        torch.testing.assert_close(cut(network, {axis.name: [1]}).predict(x), masked(network, {axis.name: [1]}).predict(x))


# Refusals ----------------------------------------------------------------------------------------------------------------------------


def test_an_unknown_axis_is_refused_and_the_known_are_named():
    with pytest.raises(CutError, match=r"no axis 'conv'; there are 0, 2"):
        Survivors(Lineage(captured(perceptron(), VECTORS)), {"conv": [0]})


@pytest.mark.parametrize("unit", [8, -1, 99])
def test_a_unit_that_is_not_there_is_refused(unit):
    with pytest.raises(CutError, match=rf"'0' has the units 0 to 7; unit {unit} was to go"):
        Survivors(Lineage(captured(perceptron(), VECTORS)), {"0": [2, unit]})


def test_the_last_unit_is_refused():
    with pytest.raises(CutError, match="would lose its last position; keep one unit"):
        cut(captured(perceptron(), VECTORS), {"2": range(5)})


def test_a_statistic_of_nothing_is_refused():
    model = Net(lambda net, x: net.two(net.one(x)[:, 4:]) * net.one(x)[:, :4].mean(1, keepdim=True), one=nn.Linear(6, 8), two=nn.Linear(4, 3))
    network = captured(model, VECTORS)
    axis = next(axis for axis in axes(network) if not axis.exact)
    with pytest.raises(CutError, match="mean would be a statistic of no position"):
        cut(network, {axis.name: range(4)})
    assert torch.isfinite(cut(network, {axis.name: range(3)}).predict(VECTORS)).all()


def test_survivors_count_every_dimension():
    lineage = Lineage(captured(perceptron(), VECTORS))
    survivors = Survivors(lineage, {"0": [1, 1, 7], "2": []})
    shapes = {str(node.target): survivors.shape(dims) for node, dims in lineage.dims.items() if node.op == "get_attr"}
    assert shapes == {"0.weight": (6, 6), "0.bias": (6,), "2.weight": (5, 6), "2.bias": (5,), "4.weight": (3, 5), "4.bias": (3,)}
    assert len(survivors.dead) == 2


def test_a_parameter_that_two_operators_share_is_cut_for_both():
    model = Net(
        lambda net, x: net.out(F.linear(F.relu(F.linear(net.a(x), net.w)), net.w.t())), a=nn.Linear(6, 8), w=weight(10, 8), out=nn.Linear(8, 3)
    )
    assert sorted(axis.units for axis in axes(captured(model, VECTORS))) == [8, 10]
