"""Weights in groups and of few levels in the rest of the chain: packing, saving, forged files, costs, lineage, and what refuses them."""

from __future__ import annotations

import copy
from typing import Any

import forgery
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_nets import Way, quantized
from small_nets import task_of
from torch import nn

from downsize.errors import CutError, TaskError
from downsize.network.cost import count
from downsize.network.lineage import axes
from downsize.network.packed import Packed, numbers_of
from downsize.quantization.insertion import settle
from downsize.techniques.prune import Prune
from downsize.techniques.sparsify import Sparsify
from downsize.testing import cut_equals_masked, loaded_equals_live

ROWS = torch.randn(2, 50)
WAYS = [Way(4, 32, asymmetric=True), Way(3, 16), Way(4, 32, levels=True)]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 10))


@given(st.data())
def test_packed_integers_come_back_and_take_the_bits_of_their_values(data):
    low, step, most = data.draw(st.integers(-60, 20)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 13))
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    numbers = torch.randint(0, most + 1, (rows, columns), generator=torch.Generator().manual_seed(columns))
    q = (low + step * numbers).to(torch.int8)
    packed = Packed.of(q)
    assert torch.equal(packed.table[numbers_of(packed.bits, packed.width, columns).long()], q)
    spread = int(numbers.max() - numbers.min())
    assert packed.width >= 1 and packed.bits.shape[1] <= -(-(columns + 7) * max(spread.bit_length(), 1) // 8)


def test_two_values_take_a_bit():
    q = torch.tensor([[-64, 64, 64, -64, 64, -64, 64, 64, -64]], dtype=torch.int8)
    packed = Packed.of(q)
    assert packed.width == 1 and packed.table.tolist() == [-64, 64] and packed.bits.tolist() == [[0b11010110, 0]]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_saved_and_settled_networks_compute_the_same(way):
    network = quantized(build, ROWS, {"0.weight": way})
    loaded_equals_live(network, ROWS)
    settled = settle(network)
    assert torch.equal(settled.predict(ROWS), network.predict(ROWS))
    assert not any("fake_quantize" in str(node.target) for node in settled.graph.nodes)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bytes_are_those_of_the_codes(way):
    network = quantized(build, ROWS, {"0.weight": way})
    row = next(row for row in count(network, ROWS).rows if "fake_quantize" in row.operator)
    groups = 40 * -(-50 // way.group)
    assert row.bytes == 50 * 40 * way.bits // 8 + 4 * groups + (4 * 2**way.bits if way.levels else 4 * groups)
    plain = count(quantized(build, ROWS, {}), ROWS)
    assert count(network, ROWS).parameters == plain.parameters


def test_quantized_networks_are_not_pruned_or_made_sparse():
    task = task_of(build(), ROWS)
    for way in WAYS:
        network = quantized(build, ROWS, {"0.weight": way})
        with pytest.raises(CutError, match="quantized already"):
            Prune(macs=0.5)(network, task)
        with pytest.raises(TaskError, match="quantized already"):
            Sparsify(0.5)(network, task)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_can_be_cut_with_their_scales_and_columns_cannot(way):
    network = quantized(build, ROWS, {"0.weight": way})
    (axis,) = [axis for axis in axes(network) if axis.units == 40]
    made = cut_equals_masked(network, {axis.name: [1, 5, 6]}, ROWS)
    assert made.tensor("0.weight").shape == (37, 50)
    inner = quantized(build, ROWS, {"2.weight": way})
    assert not [axis for axis in axes(inner) if axis.units == 40]


# Forged files ---------------------------------------------------------------------------------------------------------------------

LIES: dict[str, Any] = {
    "no group": (0, 0),
    "a negative group": (0, -32),
    "a text": (0, "32"),
    "a huge group": (0, 2**62),
    "another group": (0, 8),
    "codes beyond a byte": (2, 300),
    "codes below a byte": (1, -200),
    "no codes": (1, 15),
}


@pytest.mark.parametrize("lie", LIES)
def test_forged_groups_are_refused(lie, tmp_path):
    position, value = LIES[lie]
    quantized(build, ROWS, {"0.weight": Way(4, 32, asymmetric=True)}).save(tmp_path / "true")
    record, tensors = forgery.read(tmp_path / "true")
    forgery.load(tmp_path / "same", record, tensors)
    forged = copy.deepcopy(record)
    forgery.node(forged, "downsize.fake_quantize_groups.default")["args"][3 + position] = value
    forgery.refused(tmp_path / "forged", forged, tensors)


def test_scales_and_levels_that_do_not_fit_are_refused(tmp_path):
    for way in WAYS:
        quantized(build, ROWS, {"0.weight": way}).save(tmp_path / "true")
        record, tensors = forgery.read(tmp_path / "true")
        for name, change in (("0.weight_step", lambda t: t[1:]), ("0.weight_step", lambda t: t[:, 1:]), ("0.weight_offset", lambda t: t[None])):
            other = {**tensors, name: change(tensors[name]).contiguous()}
            forgery.refused(tmp_path / "forged", record, other)
