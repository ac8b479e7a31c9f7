"""Which input marks padding: found by what the padded positions do, in models that have a mask, and in models whose inputs only look like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import BY_NAME, masked_tokens, specimen

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.padding import padding_port


class Sentences(nn.Module):
    """Token and segment embeddings, attention under a mask or not, a mean or all tokens."""

    def __init__(self, masked: bool, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.pooled = masked, pooled
        self.ids, self.segments, self.attention = nn.Embedding(50, 8), nn.Embedding(2, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        x = self.ids(ids) + self.segments(segments)
        y = x + self.attention(x, x, x, need_weights=False, key_padding_mask=mask == 0 if self.masked else None)[0]
        # Without the mask it is still an input that is read, but not one that hides anything.
        weight = mask.to(y.dtype)[..., None] if self.masked else 1.0 + 0.1 * mask.to(y.dtype)[..., None]
        return (y * weight).sum(1) / weight.sum(1) if self.pooled else y


def batch(size: int = 3, ones: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(2, 50, (size, 7), generator=generator)
    lengths = torch.tensor([7, 4, 5, 2][:size])
    mask = (torch.arange(7) < lengths[:, None]).long() if not ones else torch.ones(size, 7, dtype=torch.long)
    return ids * mask, (torch.arange(7) >= 2).long().expand(size, 7).clone() * mask, mask


def found(network: Network, *batches: Any) -> int | None:
    return padding_port(network, [network.flat(inputs) for inputs in batches])


@pytest.mark.parametrize("pooled", [False, True])
def test_a_mask_that_hides_is_found_beside_segments_that_only_look_like_one(pooled):
    network = capture(Sentences(True, pooled).eval(), batch())
    assert found(network, batch(), batch(2)) == 2
    ids, _, mask = batch()
    # The same values in both inputs: only one of them hides.
    assert found(network, (ids, mask, mask)) == 2


@pytest.mark.parametrize("pooled", [False, True])
def test_an_input_that_hides_nothing_is_no_mask(pooled):
    network = capture(Sentences(False, pooled).eval(), batch())
    assert found(network, batch()) is None


def test_without_padding_or_with_other_values_or_with_empty_samples_there_is_none():
    network = capture(Sentences(True, False).eval(), batch())
    assert found(network, batch(ones=True)) is None
    ids, segments, mask = batch()
    assert found(network, batch(), (ids, segments, mask * 2)) is None
    assert found(network, batch(), (ids, segments, mask * torch.tensor([[1], [0], [1]]))) is None


@pytest.mark.parametrize(
    ("name", "expected"), [("bert", "attention_mask"), ("llama", "attention_mask"), ("encoder", None), ("gpt2", None), ("plain", None)]
)
def test_on_the_zoo(name, expected):
    network = specimen(name)[1]
    port = found(network, *(BY_NAME[name].inputs(size) for size in (2, 3)))
    assert (None if port is None else network.ports[port].name) == expected


def test_padding_on_the_left_is_found_where_positions_are_relative():
    network = specimen("llama")[1]
    inputs = masked_tokens(3)
    port = found(network, {**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
    assert port is not None and network.ports[port].name == "attention_mask"
