"""Statistics: histograms against numpy's, exact extremes, pieces that equal the whole, and values that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import BY_NAME, assert_close, captured, images, specimen

from downsize.errors import TaskError
from downsize.network.capture import capture
from downsize.network.dry import shapes
from downsize.network.rewrite import aten
from downsize.network.statistics import BINS, CHUNK_ELEMENTS, HISTOGRAM_ELEMENTS, Distribution, Pieces, chunks, distributions, walk


def oracle(values: list[Tensor], limit: float) -> np.ndarray:
    return np.histogram(torch.cat([v.double().reshape(-1) for v in values]).numpy(), BINS, (-limit, limit))[0]


def taken(*values: Tensor) -> Distribution:
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    return distribution


# Histograms --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 777.0])
def test_histograms_are_numpys(kind, scale):
    torch.manual_seed(0)
    values = [(torch.randn(50, 30) * scale).to(kind), (torch.randn(7, 9) * scale * 10).to(kind)]
    got = taken(*values)
    assert got.low == min(float(v.min()) for v in values) and got.high == max(float(v.max()) for v in values)
    extreme = max(-got.low, got.high)
    assert got.limit / 2 <= extreme < got.limit and np.log2(got.limit) % 1 == 0
    assert np.array_equal(got.counts.numpy(), oracle(values, got.limit))
    assert_close(got.centers(), torch.from_numpy(np.histogram_bin_edges([], BINS, (-got.limit, got.limit))[:-1] + got.limit / BINS), 1e-12)


@given(st.lists(st.tuples(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=20), st.integers(-20, 60)), min_size=1, max_size=6))
def test_the_range_doubles_without_moving_a_value(given_lists):
    lists = [[value * 2.0**power for value in each] for each, power in given_lists]
    values = [torch.tensor(each) for each in lists]
    got = taken(*values)
    assert torch.equal(got.counts, taken(torch.cat(values)).counts)
    assert np.array_equal(got.counts.numpy(), oracle(values, got.limit))
    assert (got.low, got.high) == (min(map(min, lists)), max(map(max, lists)))


def test_powers_of_two_zeros_and_the_largest_float():
    values = [torch.tensor([1.0, -1.0, 0.0, -0.0, 0.5]), torch.tensor([4.0, -4.0]), torch.tensor([2.0])]
    got = taken(*values)
    assert got.limit == 8.0 and np.array_equal(got.counts.numpy(), oracle(values, 8.0))
    nothing = taken(torch.zeros(5), torch.zeros(0), torch.zeros(()))
    assert (nothing.low, nothing.high, nothing.counts.sum(), nothing.counts[BINS // 2]) == (0.0, 0.0, 6, 6)
    largest = torch.finfo(torch.float32).max
    assert taken(torch.tensor([largest, -largest, 1.0])).counts[[0, BINS // 2, -1]].tolist() == [1, 1, 1]


def test_integers_and_strided_tensors():
    value = torch.arange(-50, 50).view(10, 10)
    assert torch.equal(taken(value.t()).counts, taken(value.float()).counts)


def test_large_tensors_are_sampled_evenly_and_weigh_what_they_hold():
    channels = 64
    value = torch.arange(channels, dtype=torch.float32).repeat(HISTOGRAM_ELEMENTS // 4) / channels
    assert value.numel() > 8 * HISTOGRAM_ELEMENTS
    value[1] = 90.0
    got = taken(value)
    assert got.high == 90.0
    values, share = got.centers()[got.counts > 0], got.counts[got.counts > 0] / value.numel()
    # Whatever the step: every channel is seen, each with its share.
    assert len(values) >= channels / 4 and got.counts.sum() == pytest.approx(value.numel(), rel=1e-4)
    coarse = torch.zeros(4, dtype=torch.float64).index_add_(0, (values * 4).long().clamp(0, 3), share)
    assert torch.allclose(coarse, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities_are_never_forgotten(bad):
    good = torch.randn(10)
    spoiled = torch.cat([good, torch.tensor([bad])])
    for values in ([spoiled], [good, spoiled], [spoiled, good], [good, spoiled, good]):
        got = taken(*values)
        assert np.isnan(got.low) and np.isnan(got.high)


# Walking -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_walking_is_running_and_every_node_is_met(name):
    _, network = specimen(name)
    leaves = network.flat(BY_NAME[name].inputs(2))
    met: dict[Any, Any] = {}

    def recorder(node: Any) -> Any:
        return lambda args, value: met.__setitem__(node, value)

    results = walk(network, leaves, {node: recorder(node) for node in network.graph.nodes if node.op != "output"})
    assert_close(results, network.graph_module(*leaves), 0)
    assert met.keys() == {node for node in network.graph.nodes if node.op != "output"} and not any(r.requires_grad for r in results)


def test_a_hook_can_replace_a_value():
    _, network = specimen("residual")
    relu = next(node for node in network.graph.nodes if node.target is aten.relu.default)
    leaves = network.flat(images()(2))
    (changed,) = walk(network, leaves, {relu: lambda args, value: torch.zeros_like(value)})
    (again,) = walk(network, network.flat(images()(2) * 5), {relu: lambda args, value: torch.zeros_like(value)})
    assert torch.equal(changed, again) and not torch.equal(changed, network.predict(images()(2)))


@pytest.mark.parametrize("name", ["residual", "bert", "unet"])
def test_shapes_are_those_of_the_example(name):
    _, network = specimen(name)
    found = shapes(network)
    leaves = network.flat(BY_NAME[name].inputs(2))
    walk(
        network,
        leaves,
        {node: (lambda args, value, node=node: check_shape(found, node, value)) for node in network.graph.nodes if node.op != "output"},
    )
    assert {node for node in found if node.op == "placeholder"} == {node for node in network.graph.nodes if node.op == "placeholder"}


def check_shape(found: Any, node: Any, value: Any) -> None:
    assert found.get(node) == (tuple(value.shape) if isinstance(value, Tensor) else None)


def test_distributions_of_pieces_are_those_of_the_whole():
    _, network = specimen("residual")
    nodes = [node for node in network.graph.nodes if node.op == "call_function"]
    x = images()(12)
    whole = distributions(network, [network.flat(x)], nodes)
    parts = distributions(network, [network.flat(x[i : i + 5]) for i in (0, 5, 10)], nodes)
    for node in nodes:
        one, two = whole[node], parts[node]
        assert one.low == pytest.approx(two.low, rel=1e-5) and one.high == pytest.approx(two.high, rel=1e-5)
        # Kernels may round differently by batch size: a value at an edge may change its bin.
        assert one.limit == two.limit and (one.counts - two.counts).abs().sum() <= 1e-3 * one.counts.sum()
        assert two.counts.sum() == walked(network, x, node).numel()


def walked(network: Any, x: Tensor, node: Any) -> Tensor:
    found: list[Tensor] = []
    walk(network, network.flat(x), {node: lambda args, value: found.append(value)})
    return found[0]


def test_values_that_become_infinite_name_the_layer():
    network = captured(lambda self, x: self.linear(x) / x.sum(), torch.ones(2, 4))
    node = next(node for node in network.graph.nodes if node.target is aten.div.Tensor)
    with pytest.raises(TaskError, match=r"div \(the model\) takes NaN or infinite values"):
        distributions(network, [network.flat(torch.ones(2, 4)), network.flat(torch.zeros(2, 4))], [node])


# Pieces ------------------------------------------------------------------------------------------------------------------------------


def test_chunks_are_the_batches_in_small_pieces():
    size = int((CHUNK_ELEMENTS / 2.5 / 3) ** 0.5)
    model = BY_NAME["resnet"].make()
    network = capture(model, images(size=size)(2))
    batches = [(images(size=size)(n), None) for n in (5, 1, 3)]
    pieces = list(chunks(network, batches))
    assert [piece[0].shape[0] for piece in pieces] == [2, 2, 1, 1, 2, 1]
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), torch.cat([x for x, _ in batches]))


@pytest.mark.parametrize(("samples", "expected"), [(1, [1]), (5, [5]), (6, [5, 1]), (8, [5, 3]), (100, [5, 4])])
def test_chunks_stop_at_the_samples_asked_for(samples, expected):
    _, network = specimen("bert")
    batches = [(BY_NAME["bert"].inputs(n), None) for n in (5, 4)]
    assert [ids.shape[0] for ids, mask in chunks(network, batches, samples)] == expected


def test_only_batched_inputs_are_cut():
    table, x = torch.randn(3, 4), torch.randn(2, 4)
    network = captured(lambda self, x, table, y: self.linear(x) + table.sum(0) + y, (x, table, x))
    (piece,) = chunks(network, [((torch.randn(7, 4), table, torch.randn(7, 4)), None)], samples=3)
    assert [leaf.shape[0] for leaf in piece] == [3, 3, 3] and torch.equal(piece[1], table)
    network = captured(lambda self, table, x: x + table.sum(0), (table, x), more=[(table[:2], torch.randn(4, 4))])
    assert [port.dims[0] for port in network.ports] == ["batch", "size1"]


def test_a_network_without_a_batch_is_given_whole():
    network = captured(lambda self, x: self.linear(x).view(1, 2, 2), torch.randn(1, 4))
    batches = [(torch.randn(1, 4), None)] * 3
    assert [piece[0].shape for piece in chunks(network, batches)] == [(1, 4)] * 3


def test_kept_pieces_are_the_chunks():
    _, network = specimen("bert")
    batches = [(BY_NAME["bert"].inputs(n), None) for n in (5, 4, 2)]
    pieces = Pieces.of(network, batches)
    for got, expected in zip(pieces, chunks(network, batches), strict=True):
        assert_close(list(got), list(expected), 0)
    others, each = pieces.parted(2)
    assert (len(others), len(each), len(pieces[1:])) == (1, 2, 2)
    assert torch.equal(others[0][0], pieces[1][0])


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "calibration data is empty"),
        ([(torch.zeros(0, 3, 16, 16), None)], "calibration data is empty"),
        ([(images()(2), None), (images()(2) * float("nan"), None)], "Calibration batch 1: input x has NaN or infinite values"),
        ([(images()(2) / 0.0, None)], "Calibration batch 0: input x has NaN or infinite values"),
    ],
)
def test_calibration_data_that_cannot_be_used_is_refused(batches, words):
    with pytest.raises(TaskError, match=words):
        list(chunks(specimen("residual")[1], batches))
