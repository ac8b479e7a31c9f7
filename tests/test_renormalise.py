"""Batch norms measured again: torch's own training statistics, numpy's moments, and later ones behind corrected earlier ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Net, conv
from torch import Tensor, nn
from zoo import BY_NAME, assert_close, images, shake, specimen

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.pruning.renormalise import channel_statistics, reestimate_batch_norms


def norms_of(module: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}


def in_training(module: nn.Module, x: Tensor) -> nn.Module:
    """The module after torch has measured its batch norms itself, on one batch, each behind those before it as measured."""
    for norm in norms_of(module).values():
        # In training mode a batch norm normalises with the batch's own moments; momentum None averages, here over one batch.
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        module(x)
    return module.eval()


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "squeeze_excite", "shuffle"])
def test_on_one_batch_they_are_torchs_own(name):
    module = BY_NAME[name].make()
    x = images()(64) * 2 + 1
    network = capture(BY_NAME[name].make(), images()(2))
    done = reestimate_batch_norms(network, [[x]])
    oracle = in_training(module, x)
    assert len(done) == len(norms_of(module))
    got = dict(network.named_tensors())
    for norm, layer in norms_of(oracle).items():
        # torch normalises with the biased variance in training and with the unbiased one, which it keeps, afterwards.
        assert_close(got[f"{norm}.running_mean"], layer.running_mean, 5e-3)
        assert_close(got[f"{norm}.running_var"], layer.running_var, 5e-3)
    first = next(iter(norms_of(oracle)))
    assert_close(got[f"{first}.running_var"], norms_of(oracle)[first].running_var, 1e-5)


def test_pieces_of_any_size_give_the_moments_of_the_whole_and_later_ones_see_corrected_ones():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.BatchNorm2d(5), nn.Flatten())
    shake(model)
    network = capture(model.eval(), images()(2))
    x = images()(11) * 3 + 100
    pieces = [[x[start:stop]] for start, stop in ((0, 5), (5, 6), (6, 11))]
    first, second = reestimate_batch_norms(network, pieces)
    tensors = dict(network.named_tensors())
    for name, index in ((first, 1), (second, 4)):
        node = next(node for node in network.graph.nodes if node.name == name)
        inputs: list[np.ndarray] = []
        # The input of the second in the network as it is now: behind the first as corrected.
        walk(network, [x], {node: lambda args, value, inputs=inputs: inputs.append(args[0].double().numpy())})
        assert np.allclose(tensors[f"{index}.running_mean"].numpy(), inputs[0].mean((0, 2, 3)), rtol=1e-5)
        assert np.allclose(tensors[f"{index}.running_var"].numpy(), inputs[0].var((0, 2, 3), ddof=1), rtol=1e-5)
    # So what comes out is normalised, but for gain and shift.
    outputs = torch.cat([leaves[0] for leaves in (walk(network, piece, {}) for piece in pieces)]).reshape(11, 5, -1).double()
    assert_close(outputs.mean((0, 2)), model[4].bias.double(), 1e-4)
    assert_close(outputs.transpose(0, 1).flatten(1).std(1), model[4].weight.double(), 1e-4)


def test_a_large_mean_costs_no_accuracy():
    rng = np.random.default_rng(0)
    values = rng.normal(1e6, 1e-3, (40, 3, 5))
    count, mean, variance = channel_statistics(torch.from_numpy(part) for part in np.split(values, [1, 7, 7, 30]))
    assert count == 200 and np.allclose(mean.numpy(), values.mean((0, 2)), rtol=1e-15)
    assert np.allclose(variance.numpy(), values.var((0, 2)), rtol=1e-6)


def untouched(network: Network, x: Tensor) -> None:
    before = network.fingerprint()
    assert reestimate_batch_norms(network, [[x]]) == [] and network.fingerprint() == before


def test_what_cannot_be_measured_is_left_alone():
    x = torch.randn(6, 4)
    used_twice = Net(lambda net, x: net.norm(net.norm(x) * 2), norm=nn.BatchNorm1d(4))
    without = Net(lambda net, x: net.norm(x), norm=nn.BatchNorm1d(4, track_running_stats=False))
    once = Net(lambda net, x: net.norm(x), norm=nn.BatchNorm1d(4))
    untouched(capture(used_twice.eval(), x), x)
    untouched(capture(without.eval(), x), x)
    network = capture(once.eval(), x)
    untouched(network, x[:1])
    untouched(network, x * float("nan"))
    assert reestimate_batch_norms(network, [[x]]) == ["batch_norm"]


def test_networks_without_batch_norm_stay_as_they_are():
    _, network = specimen("vit")
    untouched(network.copy(), images()(2))
