"""The judge of benchmarks/pruning_zoo.py: cuts made by hand, right ones and wrong ones, and what it says to them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, FusedAttention, vivid
from hypothesis import given
from hypothesis import strategies as st
from small_nets import Net
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from pruning_judge import difference, judge, kept_indices, output_layers  # pyright: ignore[reportMissingImports]

KEPT = [0, 1, 3, 6]


def part(tensor: Tensor | None, *indices: list[int] | None) -> nn.Parameter | None:
    """The slice of a parameter at those indices of each dimension (None: all of them)."""
    for d, chosen in enumerate(indices):
        tensor = tensor.index_select(d, torch.tensor(chosen)) if tensor is not None and chosen is not None else tensor
    return None if tensor is None else nn.Parameter(tensor.detach())


def cut(layer: Any, out: list[int] | None, inputs: list[int] | None) -> None:
    """Keep those outputs and inputs of a linear layer or convolution."""
    layer.weight, layer.bias = part(layer.weight, out, inputs), part(layer.bias, out)


def perceptron() -> Any:
    return vivid(Net(lambda net, x: net.two(F.relu(net.norm(net.one(x)))), one=nn.Linear(6, 8), norm=nn.LayerNorm(8), two=nn.Linear(8, 3))).eval()


def cut_perceptron(model: Any, makers: list[int] = KEPT, readers: list[int] = KEPT) -> Any:
    cut(model.one, makers, None)
    cut(model.two, None, readers)
    model.norm.weight, model.norm.bias, model.norm.normalized_shape = part(model.norm.weight, makers), part(model.norm.bias, makers), (len(makers),)
    return model


def test_an_aligned_cut_through_a_norm_is_right():
    outcome = judge(perceptron(), cut_perceptron, torch.randn(5, 6))
    assert outcome.word == "right" and outcome.gap < 1e-6
    assert outcome.removed == pytest.approx(1 - (4 * 6 + 4 + 8 + 3 * 4 + 3) / (8 * 6 + 8 + 16 + 3 * 8 + 3))


@pytest.mark.parametrize("readers", [[0, 1, 3, 5], [6, 3, 1, 0]], ids=["other positions", "another order"])
def test_a_reader_that_is_cut_elsewhere_is_wrong(readers):
    assert judge(perceptron(), lambda model: cut_perceptron(model, readers=readers), torch.randn(5, 6)).word == "wrong"


def test_statistics_over_the_dead_are_wrong():
    def prune(model: Any) -> Any:
        made = cut_perceptron(model)
        made.function = lambda net, x: net.two(F.relu(F.layer_norm(F.pad(net.one(x), (0, 4)), (8,))[:, :4] * net.norm.weight + net.norm.bias))
        return made

    assert judge(perceptron(), prune, torch.randn(5, 6)).word == "wrong"


def attention() -> Any:
    return vivid(FusedAttention(16, 4)).eval()


def whole_heads(x: Tensor, net: Any, heads: int) -> Tensor:
    n, t, _ = x.shape
    q, k, v = net.qkv(x).reshape(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return net.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(n, t, -1))


@pytest.mark.parametrize(
    ("kept", "heads", "word"),
    [
        ([0, 1, 2, 3, 8, 9, 10, 11], 2, "right"),
        ([0, 1, 4, 5, 8, 9, 12, 13], 4, "right"),
        ([0, 1, 2, 3, 5, 9, 10, 15], 2, "wrong"),
        ([0, 1, 4, 5, 8, 9, 12, 13], 2, "wrong"),
    ],
    ids=["whole heads", "half of each head", "what is left of heads is mixed", "two heads become one"],
)
def test_heads(kept, heads, word):
    def prune(model: Any) -> Any:
        cut(model.qkv, [i + 16 * side for side in range(3) for i in kept], None)
        cut(model.out, None, kept)
        model.forward = lambda x: whole_heads(x, model, heads)
        return model

    assert judge(attention(), prune, torch.randn(2, 5, 16)).word == word


@pytest.mark.parametrize(("kept", "word"), [([0, 2, 4, 5], "right"), ([0, 4, 5, 6], "wrong")], ids=["as many of each group", "groups change"])
def test_group_norm(kept, word):
    model = vivid(Net(lambda net, x: net.two(net.norm(net.one(x))), one=nn.Conv2d(3, 8, 1), norm=nn.GroupNorm(2, 8), two=nn.Conv2d(8, 2, 1))).eval()

    def prune(model: Any) -> Any:
        cut(model.one, kept, None)
        cut(model.two, None, kept)
        model.norm.weight, model.norm.bias, model.norm.num_channels = part(model.norm.weight, kept), part(model.norm.bias, kept), len(kept)
        return model

    assert judge(model, prune, torch.randn(2, 3, 4, 4)).word == word


@pytest.mark.parametrize("baked", [True, False])
def test_weight_norm_keeps_the_weight_it_had(baked):
    """Slicing the direction alone would change its norm, and with it every weight that stays."""
    model = vivid(Net(lambda net, x: net.two(F.relu(net.one(x))), one=nn.Linear(6, 8), two=weight_norm(nn.Linear(8, 3)))).eval()

    def prune(model: Any) -> Any:
        weight = model.two.weight.detach()[:, KEPT]
        cut(model.one, KEPT, None)
        raw = model.two.parametrizations.weight
        raw.original1 = part(raw.original1, None, KEPT)
        if baked:
            model.function = lambda net, x: F.linear(F.relu(net.one(x)), weight, net.two.bias)
        return model

    assert judge(model, prune, torch.randn(5, 6)).word == ("right" if baked else "wrong")


def test_the_other_outcomes():
    def fails(model: Any) -> Any:
        raise ValueError("cannot")

    def breaks(model: Any) -> Any:
        cut(model.one, KEPT, None)
        return model

    def changes(model: Any) -> Any:
        made = cut_perceptron(model)
        made.two.weight.data *= 2
        return made

    words = {prune: judge(perceptron(), prune, torch.randn(5, 6)) for prune in (fails, breaks, changes, lambda model: model)}
    assert [outcome.word for outcome in words.values()] == ["crash", "forward fails", "not judged", "nothing pruned"]
    assert words[fails].detail == "ValueError: cannot" and words[changes].detail == "two.weight is not a part of the original's"


@given(st.data())
def test_indices_are_found_by_values(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    kept = [sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))) for size in shape]
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    sliced = tensor
    for d, indices in enumerate(kept):
        sliced = sliced.index_select(d, torch.tensor(indices))
    assert kept_indices(tensor, sliced) == kept
    assert kept_indices(tensor, sliced + 1) is None


@pytest.mark.parametrize(
    ("name", "layers"),
    [("pixel_shuffle", {"out"}), ("autoencoder", {"mean", "spread", "decoder.3"}), ("crnn", {"head"}), ("shared_weights", {"boxes"})],
)
def test_output_layers(name, layers):
    model = ARCHITECTURES[name].make()
    found = output_layers(model, ARCHITECTURES[name].inputs(2))
    assert {path for path, module in model.named_modules() if any(module is layer for layer in found)} == layers


def test_difference():
    one = torch.tensor([[1.0, -4.0, 3.0], [2.0, 0.0, 5.0]])
    assert difference(one, one) == 0 and difference(one, one + torch.tensor([0.0, 0.5, 0.0])) == pytest.approx(0.1)
    assert difference(one, one[:, [0, 2]]) == 0 and difference(one, one[:, [2, 0]]) > 0.1
    assert difference(one, one[:1]) == difference(one, one[:, :, None]) == difference(one, one * float("nan")) == float("inf")
