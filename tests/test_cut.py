"""Cutting: every form of tests/forms.py cut at random places and compared with the mask, the mask with forwards written by hand, and cuts
with modules rebuilt by hand from slices of the weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import FusedAttention, vivid
from captures import form
from forms import FORMS, attended, conv, projections
from hypothesis import given, settings
from random_nets import networks
from small_nets import Net, weight
from torch import Tensor, nn
from zoo import floats, images, shake

from downsize.errors import CutError
from downsize.network.capture import capture
from downsize.network.cut import cut
from downsize.network.lineage import Lineage
from downsize.network.masked import masked
from downsize.network.network import Network
from downsize.structure import flatten

EXACT, STATISTIC = 1e-5, 1e-4
FAST = (
    "grouped queries",
    "heads around the batch",
    "initial states",
    "written into views",
    "squeezed",
    "repeated",
    "norm over two axes",
    "group norm",
)


def captured(model: nn.Module, inputs: Any) -> Network:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shake(model)
    return capture(vivid(model).eval(), inputs)


def gap(one: Any, other: Any) -> float:
    """The largest difference of two outputs, as a share of the largest value."""
    worst = 0.0
    for a, b in zip(flatten(one)[0], flatten(other)[0], strict=True):
        assert a.shape == b.shape and bool(torch.isfinite(b).all())
        a, b = a.detach().double(), b.detach().double()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def deaths(lineage: Lineage, seed: int = 1) -> list[dict[str, list[int]]]:
    """Of every axis some units at random, of every one all but the last, and some of all axes at once."""
    rng = random.Random(seed)
    axes = [axis for axis in lineage.axes if axis.units > 1]
    some = {axis.name: sorted(rng.sample(range(axis.units), rng.randint(1, axis.units - 1))) for axis in axes}
    return [*({name: units} for name, units in some.items()), *({axis.name: list(range(axis.units - 1))} for axis in axes), some]


def assert_cut_is_mask(lineage: Lineage, inputs: Callable[[int], Any], dead: dict[str, list[int]], batches: tuple[int, ...] = (1, 3)) -> bool:
    """Returns whether the cut changes anything. It need not be legal: units of several axes, or of one that is split, may be a whole dimension."""
    try:
        made, oracle = cut(lineage, dead), masked(lineage, dead)
    except CutError as error:
        assert "keep one unit" in str(error)
        return False
    exact = all(lineage.axis(name).exact for name in dead)
    for batch in batches:
        assert gap(made.predict(inputs(batch)), oracle.predict(inputs(batch))) < (EXACT if exact else STATISTIC), (dead, batch)
    return gap(made.predict(inputs(3)), lineage.network.predict(inputs(3))) > STATISTIC


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FORMS])
def test_every_form_is_cut_as_it_is_masked(name):
    specimen, axes = FORMS[name]
    lineage = Lineage(form(name))
    found = [f"{'' if axis.exact else '~'}{axis.kind} {axis.units}" for axis in lineage.axes if axis.units > 1]
    assert ", ".join(found) == axes
    assert [assert_cut_is_mask(lineage, specimen.inputs, dead) for dead in deaths(lineage)].count(True) >= len(found)


# The mask, by hand -------------------------------------------------------------------------------------------------------------------


def zeroed(weight: Tensor, dead: list[int]) -> Tensor:
    """A reader's weight with zeros in the columns of dead inputs."""
    made = weight.detach().clone()
    made[:, dead] = 0
    return made


def test_the_mask_of_convolutions_zeroes_what_they_read():
    """The maker's bias and the shift of the batch norm stay; the readers' columns are zero."""
    model: Any = Net(lambda net, x: net.b(F.relu(net.norm(net.a(x)))) + net.c(net.norm(net.a(x))), a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 4),
                     c=conv(8, 4, 1))  # fmt: skip
    x, dead = images(3, 8)(3), [1, 2, 6]
    network = captured(model, x)
    y = model.norm(model.a(x))
    expected = F.conv2d(F.relu(y), zeroed(model.b.weight, dead), model.b.bias, padding=1)
    expected = expected + F.conv2d(y, zeroed(model.c.weight, dead), model.c.bias)
    assert gap(masked(network, {"a": dead}).predict(x), expected) < EXACT
    assert gap(cut(network, {"a": dead}).predict(x), expected) < EXACT


def test_the_mask_of_heads_zeroes_what_the_output_projection_reads():
    model: Any = Net(attended, **projections())
    x = floats(5, 12)(3)
    network = captured(model, x)
    model.o.weight = nn.Parameter(zeroed(model.o.weight, [*range(6), *range(12, 18)]))  # heads 0 and 2 of 6 values each
    expected = model(x)
    for made in (masked, cut):
        assert gap(made(network, {"q.heads": [0, 2]}).predict(x), expected) < EXACT


def test_the_mask_of_a_layer_norm_takes_it_over_the_living():
    model: Any = Net(lambda net, x: net.b(net.norm(net.a(x))), a=nn.Linear(6, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 3))
    x, dead, alive = floats(6)(3), [0, 5], [1, 2, 3, 4, 6, 7]
    network = captured(model, x)
    y = model.a(x)[:, alive]
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * model.norm.weight[alive] + model.norm.bias[alive]
    expected = y @ model.b.weight[:, alive].T + model.b.bias
    (axis,) = Lineage(network).axes
    assert (axis.kind, axis.exact) == ("width", False)
    for made in (masked, cut):
        assert gap(made(network, {axis.name: dead}).predict(x), expected) < EXACT


def test_the_mask_of_a_sum_over_two_axes():
    model: Any = Net(lambda net, x: (torch.tanh(net.a(x)[:, :, None] * net.b(x)[:, None] + 1)).sum((1, 2))[:, None] * x, a=nn.Linear(6, 8),
                     b=nn.Linear(6, 7))  # fmt: skip
    x = floats(6)(3)
    network = captured(model, x)
    z = torch.tanh(model.a(x)[:, :, None] * model.b(x)[:, None] + 1)
    expected = z[:, 2:, :-1].sum((1, 2))[:, None] * x
    for made in (masked, cut):
        assert gap(made(network, {"a": [0, 1], "b": [6]}).predict(x), expected) < EXACT


# Smaller modules, by hand ------------------------------------------------------------------------------------------------------------


def part(tensor: Tensor, *indices: list[int] | None) -> Tensor:
    for dim, chosen in enumerate(indices):
        tensor = tensor if chosen is None else tensor.index_select(dim, torch.tensor(chosen))
    return tensor.detach()


def test_an_inverted_bottleneck_is_one_with_fewer_channels():
    def build(inner: int) -> Any:
        parts = {"one": conv(3, inner, 1), "norm": nn.BatchNorm2d(inner), "deep": conv(inner, inner, groups=inner), "two": conv(inner, 4, 1)}
        return Net(lambda net, x: net.two(F.relu6(net.deep(F.relu6(net.norm(net.one(x)))))), **parts)

    x, kept = images(3, 8)(3), [0, 3, 4, 8]
    model, small = build(9), build(4).eval()
    network = captured(model, x)
    state = {name: value if value.dim() == 0 or name.startswith("two") else part(value, kept) for name, value in model.state_dict().items()}
    state["two.weight"], state["two.bias"] = part(model.two.weight, None, kept), model.two.bias
    small.load_state_dict(state)
    made = cut(network, {"one": [1, 2, 5, 6, 7]})
    assert gap(made.predict(x), small(x)) < EXACT
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in small.parameters())


def test_fused_attention_is_one_with_fewer_heads():
    model: Any = FusedAttention(16, 4)
    x, kept = floats(5, 16)(3), [1, 3]
    network = captured(model, x)
    heads = next(axis for axis in Lineage(network).axes if axis.kind == "heads")
    rows = [i * 16 + h * 4 + d for i in range(3) for h in kept for d in range(4)]
    qkv = F.linear(x, part(model.qkv.weight, rows), part(model.qkv.bias, rows)).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = torch.softmax(qkv[0] @ qkv[1].mT / 2, -1) @ qkv[2]
    expected = F.linear(y.transpose(1, 2).flatten(2), part(model.out.weight, None, rows[:8]), model.out.bias)
    assert gap(cut(network, {heads.name: [0, 2]}).predict(x), expected) < EXACT


def test_head_dims_keep_the_scale_of_the_whole_head():
    model: Any = Net(attended, **projections())
    x, kept = floats(5, 12)(3), [0, 2, 3]
    network = captured(model, x)
    rows = [h * 4 + d for h in range(4) for d in kept]
    q, k = (F.linear(x, part(one.weight, rows), part(one.bias, rows)).view(3, 5, 4, 3).transpose(1, 2) for one in (model.q, model.k))
    v = model.v(x).view(3, 5, 4, 6).transpose(1, 2)
    expected = model.o((torch.softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).flatten(2))  # 2 = sqrt of the 4 there were
    assert gap(cut(network, {"q.head_dims": [1]}).predict(x), expected) < EXACT


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_one_with_fewer_units(kind):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    model: Any = Net(lambda net, x: net.out(net.rnn(x)[0]), rnn=kind(12, 7, batch_first=True), out=nn.Linear(7, 3))
    small: Any = Net(lambda net, x: net.out(net.rnn(x)[0]), rnn=kind(12, 4, batch_first=True), out=nn.Linear(4, 3)).eval()
    x, kept = floats(5, 12)(3), [0, 1, 4, 6]
    network = captured(model, x)
    rows = [gate * 7 + unit for gate in range(gates) for unit in kept]
    state = {f"rnn.{name}": part(value, rows, kept if "weight_hh" in name else None) for name, value in model.rnn.state_dict().items()}
    small.load_state_dict({**state, "out.weight": part(model.out.weight, None, kept), "out.bias": model.out.bias})
    (axis,) = Lineage(network).axes
    assert gap(cut(network, {axis.name: [2, 3, 5]}).predict(x), small(x)) < EXACT


def test_a_flattened_map_loses_the_columns_of_its_channels():
    model: Any = Net(lambda net, x: net.two(net.one(x).flatten(1)), one=conv(3, 8), two=nn.Linear(8 * 64, 3))
    x, kept = images(3, 8)(3), [2, 3, 7]
    network = captured(model, x)
    columns = [channel * 64 + place for channel in kept for place in range(64)]
    y = F.conv2d(x, part(model.one.weight, kept), part(model.one.bias, kept), padding=1).flatten(1)
    assert gap(cut(network, {"one": [0, 1, 4, 5, 6]}).predict(x), F.linear(y, part(model.two.weight, None, columns), model.two.bias)) < EXACT


# Tensors -----------------------------------------------------------------------------------------------------------------------------


def test_a_tensor_with_two_names_stays_one_and_the_rest_is_shared():
    model: Any = Net(lambda net, x: F.linear(F.relu(F.linear(net.embed(x), net.up.weight)), net.tied.weight.t()) @ net.out, embed=nn.Linear(6, 8),
                     up=nn.Linear(8, 10, bias=False), tied=nn.Linear(8, 10, bias=False), out=weight(8, 3))  # fmt: skip
    model.tied.weight = model.up.weight
    network = captured(model, floats(6)(2))
    lineage = Lineage(network)
    axis = next(axis for axis in lineage.axes if axis.units == 10)
    made = cut(network, {axis.name: [0, 9]})
    names = [name for name, tensor in made.named_tensors() if tensor.shape == (8, 8) and name != "embed.weight"]
    assert len({id(made.tensor(name)) for name in names}) == 1
    assert made.tensor("embed.weight") is network.tensor("embed.weight")
    assert gap(made.predict(floats(6)(3)), masked(lineage, {axis.name: [0, 9]}).predict(floats(6)(3))) < EXACT


def test_a_cut_leaves_the_network_as_it_was_and_can_take_other_values():
    model: Any = Net(lambda net, x: net.two(F.relu(net.one(x))), one=nn.Linear(6, 8), two=nn.Linear(8, 3))
    x = floats(6)(3)
    network = captured(model, x)
    before, lineage = network.fingerprint(), Lineage(network)
    changed = network.copy()
    with torch.no_grad():
        changed.tensor("two.weight").mul_(2)
    made = cut(lineage, {"one": [3]}, changed)
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(made.tensor("two.weight"), 2 * model.two.weight[:, kept]) and network.fingerprint() == before
    assert isinstance(made.tensor("two.weight"), nn.Parameter)


# Random networks ---------------------------------------------------------------------------------------------------------------------


def assert_random_network_is_cut_as_masked(specimen: Any, seed: int) -> None:
    torch.set_num_threads(1)
    lineage = Lineage(capture(specimen.make(), specimen.inputs(2)))
    rng = random.Random(seed)
    axes = [axis for axis in lineage.axes if axis.units > 1]
    one = {axis.name: rng.sample(range(axis.units), rng.randint(1, axis.units - 1)) for axis in rng.sample(axes, min(1, len(axes)))}
    all_of_them = {axis.name: rng.sample(range(axis.units), rng.randint(1, axis.units - 1)) for axis in axes}
    for dead in (one, all_of_them):
        if dead:
            made, oracle = cut(lineage, dead), masked(lineage, dead)
            exact = all(lineage.axis(name).exact for name in dead)
            for batch in (1, 3):
                found = gap(made.predict(specimen.inputs(batch)), oracle.predict(specimen.inputs(batch)))
                assert found < (EXACT if exact else STATISTIC), (specimen.name, dead)


@settings(max_examples=8)
@given(networks(2))
def test_random_networks_are_cut_as_masked(specimen):
    assert_random_network_is_cut_as_masked(specimen, 1)


@pytest.mark.slow
@settings(max_examples=20)
@given(networks())
def test_more_random_networks_are_cut_as_masked(specimen):
    assert_random_network_is_cut_as_masked(specimen, 2)
