"""Edits that keep what a network computes: folding, dropping identities, and the verbs under them; with the traps of shared and written memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import BY_NAME, Layer, assert_close, captured, shake, specimen, targets

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.rewrite import (
    add_constant,
    argument,
    aten,
    constant,
    drop_identities,
    fold_batch_norm,
    fold_padding,
    insert_after,
    only_user,
    set_bias,
    set_constant,
)


def networks(model: nn.Module, x: Tensor) -> tuple[Network, Network]:
    """The network, and a fork of it to edit."""
    shake(model)
    network = capture(model.eval(), x)
    return network, network.fork()


def node_of(network: Network, target: Any) -> Any:
    return next(node for node in network.graph.nodes if node.target is target)


# Batch norm --------------------------------------------------------------------------------------------------------------------------

FOLDING = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same", bias=False), nn.BatchNorm1d(6), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (3, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d(6), (3, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, bias=False), nn.BatchNorm2d(6), (3, 4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), (3, 4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "without gain": (lambda: nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (3, 4, 5, 5)),
    "other eps": (lambda: nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.1), (3, 4, 5, 5)),
    "double precision": (lambda: nn.Conv2d(4, 6, 3, dtype=torch.float64), nn.BatchNorm2d(6, dtype=torch.float64), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("name", sorted(FOLDING))
def test_batch_norm_folds(name):
    torch.manual_seed(0)
    layer, norm, shape = FOLDING[name]
    model = nn.Sequential(layer(), norm, nn.ReLU(inplace=True))
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    network, folded = networks(model, x)
    assert fold_batch_norm(folded) == 1 and "aten.batch_norm.default" not in targets(folded)
    assert_close(folded.predict(x), network.predict(x))
    assert sum(1 for p in folded.parameters()) == 2
    assert_close(network.predict(x), model(x).detach())


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "squeeze_excite", "shuffle", "resnet", "segformer"])
def test_batch_norm_folds_in_whole_models(name):
    _, network = specimen(name)
    folded = network.fork()
    norms = targets(network).count("aten.batch_norm.default")
    assert fold_batch_norm(folded) == norms > 0
    x = BY_NAME[name].inputs(3)
    assert_close(folded.predict(x), network.predict(x))


def test_folding_leaves_other_networks_that_share_the_tensors_alone():
    _, network = specimen("plain")
    x = BY_NAME["plain"].inputs(2)
    before = network.predict(x)
    fold_batch_norm(network.fork())
    assert torch.equal(network.predict(x), before)


def test_a_shared_convolution_gets_a_weight_for_each_norm():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.conv(self.one(self.conv(x)))) + self.conv(x.flip(3))

    x = torch.randn(2, 3, 6, 6)
    network, folded = networks(Shared(), x)
    assert fold_batch_norm(folded) == 2
    assert_close(folded.predict(x), network.predict(x))
    assert len({id(tensor) for _, tensor in folded.named_tensors()}) == 6


def test_a_weight_with_two_names_stays_what_it_was_for_the_other():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    network, _ = networks(model, x)
    second = next(node for node in reversed(network.graph.nodes) if node.target is aten.linear.default)
    second.update_arg(1, add_constant(network, "second", network.tensor("0.weight"), second))
    network.recompile()
    folded = network.fork()
    assert fold_batch_norm(folded) == 1
    assert_close(folded.predict(x), network.predict(x))


class Normed(Layer):
    """A linear layer, and the mean and variance for a batch norm behind it."""

    mean: Tensor
    var: Tensor

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__(forward)
        self.register_buffer("mean", torch.arange(4.0))
        self.register_buffer("var", torch.arange(1.0, 5.0))


def normed(forward: Callable[..., Any], x: Tensor) -> tuple[Network, Network]:
    return networks(Normed(forward), x)


def behind_a_linear_of_three_dimensions(self: Normed, x: Tensor) -> Tensor:
    return F.batch_norm(self.linear(x), self.mean, self.var)


def read_by_another(self: Normed, x: Tensor) -> Tensor:
    y = self.linear(x)
    return F.batch_norm(y, self.mean, self.var) + y


def with_a_computed_gain(self: Normed, x: Tensor) -> Tensor:
    return F.batch_norm(self.linear(x), self.mean, self.var, weight=self.linear.bias * 2)


def with_a_computed_bias(self: Normed, x: Tensor) -> Tensor:
    return F.batch_norm(F.linear(x, self.linear.weight, self.linear.bias * 2), self.mean, self.var)


def with_a_computed_weight(self: Normed, x: Tensor) -> Tensor:
    return F.batch_norm(F.linear(x, self.linear.weight.t()), self.mean, self.var)


def with_the_batchs_own_statistics(self: Normed, x: Tensor) -> Tensor:
    return F.batch_norm(self.linear(x), None, None, training=True)


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (behind_a_linear_of_three_dimensions, (3, 4, 4)),
        (read_by_another, (3, 4)),
        (with_a_computed_gain, (3, 4)),
        (with_a_computed_bias, (3, 4)),
        (with_a_computed_weight, (3, 4)),
        (with_the_batchs_own_statistics, (3, 4)),
    ],
)
def test_batch_norms_that_cannot_be_folded_stay(forward, shape):
    network, folded = normed(forward, torch.randn(shape))
    assert fold_batch_norm(folded) == 0
    x = torch.randn(shape)
    assert torch.equal(folded.predict(x), network.predict(x))


def test_nothing_folds_in_training():
    network = specimen("plain")[1].fork().train()
    assert fold_batch_norm(network) == 0


def test_a_functional_batch_norm_behind_a_flat_layer_folds():
    network, folded = normed(lambda self, x: F.batch_norm(self.linear(x), self.mean, self.var), torch.randn(3, 4))
    assert fold_batch_norm(folded) == 1
    assert_close(folded.predict(torch.ones(5, 4)), network.predict(torch.ones(5, 4)))


# Padding -----------------------------------------------------------------------------------------------------------------------------

PADDING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "only a weight": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, bias=False)), (2, 3, 7, 7), 1),
    "weight and bias": (lambda: nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 1),
    "with a stride": (lambda: nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(3, 4, 3, stride=2)), (2, 3, 7, 7), 1),
    "with padding of its own": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding=(0, 2), dilation=2)), (2, 3, 7, 7), 1),
    "unequal by dimension": (lambda: nn.Sequential(nn.ZeroPad2d((1, 1, 3, 3)), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 1),
    "one dimension": (lambda: nn.Sequential(nn.ConstantPad1d(2, 0.0), nn.Conv1d(3, 4, 3)), (2, 3, 7), 1),
    "three dimensions": (lambda: nn.Sequential(nn.ConstantPad3d(1, 0.0), nn.Conv3d(2, 3, 3)), (1, 2, 4, 4, 4), 1),
    "asymmetric": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 0),
    "not with zeros": (lambda: nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 0),
    "reflected": (lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 0),
    "cropped": (lambda: nn.Sequential(nn.ZeroPad2d(-1), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 0),
    "one side only": (lambda: nn.Sequential(nn.ZeroPad2d((1, 1, 0, 0)), nn.ReLU(), nn.Conv2d(3, 4, 3)), (2, 3, 7, 7), 0),
    "before a transposed convolution": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ConvTranspose2d(3, 4, 3)), (2, 3, 7, 7), 0),
}


@pytest.mark.parametrize("name", sorted(PADDING))
def test_padding_folds_where_it_can(name):
    torch.manual_seed(0)
    model, shape, count = PADDING[name]
    x = torch.randn(shape)
    network, folded = networks(model(), x)
    assert fold_padding(folded) == count
    assert ("aten.pad.default" in targets(folded)) == (not count)
    assert_close(folded.predict(x), network.predict(x))


class Padded(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.chosen = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.chosen(self, x)


def two_readers(self: Padded, x: Tensor) -> Tensor:
    y = F.pad(x, [1, 1, 1, 1])
    return self.one(y)[:, :, :7, :7] + self.two(y)[:, :, :7, :7]


def another_reader(self: Padded, x: Tensor) -> Tensor:
    y = F.pad(x, [1, 1, 1, 1])
    return self.one(y) + y.mean()


def source_is_written_later(self: Padded, x: Tensor) -> Tensor:
    x = x * 2
    y = F.pad(x, [1, 1, 1, 1])
    x.view(-1)[:20].add_(3)
    return self.one(y) + x.mean()


def padded_channels(self: Padded, x: Tensor) -> Tensor:
    return self.one(F.pad(x[:, :1], [0, 0, 0, 0, 1, 1]))


@pytest.mark.parametrize(("forward", "count"), [(two_readers, 1), (another_reader, 0), (source_is_written_later, 0), (padded_channels, 0)])
def test_padding_with_other_readers_and_writers(forward, count):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    network, folded = networks(Padded(forward), x)
    assert fold_padding(folded) == count
    assert_close(folded.predict(x), network.predict(x))


# Identities --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_dropping_identities_changes_nothing(name):
    network = specimen(name)[1]
    edited = network.fork()
    drop_identities(edited)
    assert not {"aten.dropout.default", "aten.alias.default", "aten.clone.default"} & set(targets(edited))
    x = BY_NAME[name].inputs(2)
    assert_close(edited.predict(x), network.predict(x), 0)


def copy_is_written(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y.clone()
    z.view(-1)[:3].add_(5)
    return y + z


def source_is_written(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y.clone()
    y.view(-1)[:3].add_(5)
    return y + z


def view_of_the_copy_is_written(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y.clone().transpose(0, 1)[1:].reshape(-1)[:2]
    z.mul_(7)
    return y + z.sum()


def dropout_is_an_alias(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = F.dropout(y, 0.5, False)
    z.view(-1)[:3].add_(5)
    return y + z


@pytest.mark.parametrize("forward", [copy_is_written, source_is_written, view_of_the_copy_is_written, dropout_is_an_alias])
def test_copies_that_are_written_stay(forward):
    network = captured(forward, torch.randn(4, 4))
    edited = network.fork()
    drop_identities(edited)
    x = torch.randn(4, 4)
    assert torch.equal(edited.predict(x), network.predict(x))


def test_dropout_that_is_switched_on_stays():
    network = specimen("plain")[1].fork().train()
    drop_identities(network)
    assert "aten.dropout.default" in targets(network)


# Verbs -------------------------------------------------------------------------------------------------------------------------------


def test_arguments_by_position_name_and_default():
    network = specimen("plain")[1]
    node = node_of(network, aten.conv2d.default)
    assert argument(node, 3, "stride") == [1, 1] and argument(node, 6, "groups", 1) == 1
    assert constant(network, node.args[1]) is network.tensor("0.0.weight") and constant(network, node) is None and constant(network, 3) is None


def test_constants_are_replaced_and_added_under_free_names():
    network = specimen("tied")[1].copy()
    node = next(node for node in network.graph.nodes if node.target == "block.weight")
    set_constant(network, node, torch.zeros(12, 12))
    assert isinstance(network.tensor("block.weight"), nn.Parameter) and network.tensor("block.weight").requires_grad
    before = node_of(network, aten.linear.default)
    names = [add_constant(network, "block.weight", torch.ones(2), before).target for _ in range(2)]
    assert names == ["block.weight_2", "block.weight_3"]
    assert add_constant(network, "graph", torch.ones(2), before).target == "graph_2"
    below = [add_constant(network, f"{names[0]}.first.weight", torch.ones(2), before).target for _ in range(2)]
    assert below == [f"{str(names[0]).replace('.', '_')}_first_weight", f"{str(names[0]).replace('.', '_')}_first_weight_2"]  # a tensor has no parts
    assert torch.equal(network.tensor("block.weight_3"), torch.ones(2))


def test_inserting_behind_a_node():
    network = specimen("residual")[1].fork()
    node = node_of(network, aten.linear.default)
    assert only_user(node) is not None
    offset = add_constant(network, "offset", torch.full((10,), 2.0), next(iter(node.users)))
    made = insert_after(network, node, aten.add.Tensor, (offset,))
    network.recompile()
    assert made.meta["module"] == node.meta["module"] and only_user(node) is made
    x = BY_NAME["residual"].inputs(2)
    assert torch.equal(network.predict(x), specimen("residual")[1].predict(x) + 2)


def test_setting_a_bias():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + F.linear(x, self.linear.weight) + self.linear(-x)

    x = torch.randn(3, 4)
    network, edited = networks(Twice(), x)
    for number, layer in enumerate([node for node in edited.graph.nodes if node.target is aten.linear.default]):
        set_bias(edited, layer, torch.full((4,), 10.0**number))
    edited.recompile()
    bias = network.tensor("linear.bias").detach()
    assert_close(edited.predict(x), network.predict(x) - 2 * bias + 111)
