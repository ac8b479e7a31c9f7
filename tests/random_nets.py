"""Small random architectures: ``networks()`` is a hypothesis strategy of Specimens, whose names tell how they are built.

A picture goes through blocks for feature maps, perhaps turns into a sequence, goes through blocks for sequences, and ends in a head; or it is
a sequence (of vectors or of tokens) from the beginning. A block is a function of the shape it reads, a width it may use and a variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from architectures import vivid
from hypothesis import strategies as st
from small_nets import Net
from torch import Tensor, nn
from zoo import Specimen, floats, images, tokens

WIDTHS = (8, 16, 24)
HEADS, CLASSES, WORDS = 4, 5, 20
PICTURE, TEXT = 8, 6  # sizes of inputs


class Shape(NamedTuple):
    """Channels, and the size of a feature map's sides or a sequence's length."""

    channels: int
    size: int


Block = tuple[nn.Module, Shape]
Maker = Callable[[Shape, int, int], Block]


# Feature maps: [batch, channels, size, size] ---------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, size: int = 3, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=bias)


def conv_bn(inputs: int, outputs: int, size: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, size, groups, bias=False), nn.BatchNorm2d(outputs))


def conv_bn_relu(at: Shape, width: int, variant: int) -> Block:
    activation = (nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU())[variant]
    return nn.Sequential(conv_bn(at.channels, width), activation), Shape(width, at.size)


def residual(at: Shape, width: int, variant: int) -> Block:
    if variant < 2:
        parts = {"one": conv_bn(at.channels, width), "two": conv_bn(width, at.channels)}
        return Net(lambda net, x: F.relu(x + net.two(F.relu(net.one(x)))), **parts), at
    parts = {"one": conv_bn(at.channels, width), "two": conv_bn(width, width), "skip": conv_bn(at.channels, width, 1)}
    return Net(lambda net, x: F.relu(net.skip(x) + net.two(F.relu(net.one(x)))), **parts), Shape(width, at.size)


def concat(at: Shape, width: int, variant: int) -> Block:
    def forward(net: Any, x: Tensor) -> Tensor:
        parts = [x, F.relu(net.layer(x))]
        return torch.cat(parts if variant % 2 else parts[::-1], 1)

    return Net(forward, layer=conv(at.channels, width)), Shape(at.channels + width, at.size)


def split(at: Shape, width: int, variant: int) -> Block:
    """Parts that are convolved each on its own, or swapped and multiplied."""
    one = at.channels // 2 if variant < 2 else at.channels // 4
    two = at.channels - one
    if variant == 0 and one == two and one >= 8:
        return Net(lambda net, x: x.chunk(2, 1)[1] * torch.sigmoid(x.chunk(2, 1)[0])), Shape(at.channels // 2, at.size)

    def forward(net: Any, x: Tensor) -> Tensor:
        left, right = (x[:, :one], x[:, one:]) if variant == 3 else x.split([one, two], 1)
        return torch.cat([F.relu(net.layer(right)), left], 1)

    return Net(forward, layer=conv(two, width)), Shape(one + width, at.size)


def grouped(at: Shape, width: int, variant: int) -> Block:
    groups = math.gcd((2, 4, 4, 8)[variant], at.channels)
    return nn.Sequential(conv_bn(at.channels, at.channels, groups=groups), nn.ReLU(), conv(at.channels, width, 1)), Shape(width, at.size)


def depthwise(at: Shape, width: int, variant: int) -> Block:
    """An inverted bottleneck; or a depthwise convolution with two outputs a channel."""
    if variant == 3:
        return nn.Sequential(conv(at.channels, 2 * at.channels, groups=at.channels), nn.ReLU6()), Shape(2 * at.channels, at.size)
    layers = nn.Sequential(
        conv_bn(at.channels, width, 1), nn.ReLU6(), conv_bn(width, width, groups=width), nn.ReLU6(), conv_bn(width, at.channels, 1)
    )
    return Net(lambda net, x: x + net.layers(x), layers=layers), at


def squeeze_excite(at: Shape, width: int, variant: int) -> Block:
    if variant < 2:
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(at.channels, 8, 1), nn.ReLU(), conv(8, at.channels, 1), nn.Sigmoid())
        return Net(lambda net, x: x * net.gate(x), gate=gate), at
    gate = nn.Sequential(nn.Linear(at.channels, 8), nn.SiLU(), nn.Linear(8, at.channels), nn.Hardsigmoid())
    return Net(lambda net, x: net.gate(x.mean((2, 3))).view(x.shape[0], -1, 1, 1) * x, gate=gate), at


def shuffle(at: Shape, width: int, variant: int) -> Block:
    groups = math.gcd((2, 4)[variant % 2], at.channels)

    def forward(net: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return net.layer(x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w))

    return Net(forward, layer=conv(at.channels, at.channels, groups=groups if variant < 2 else 1)), at


def pool(at: Shape, width: int, variant: int) -> Block:
    if at.size < 4 or variant == 3:
        return nn.MaxPool2d(3, 1, 1), at
    halved: nn.Module = (nn.MaxPool2d(2), nn.AvgPool2d(2), conv(at.channels, at.channels))[variant]
    return (halved if variant < 2 else Net(lambda net, x: net.layer(x)[:, :, ::2, ::2], layer=halved)), Shape(at.channels, -(-at.size // 2))


def normed(at: Shape, width: int, variant: int) -> Block:
    """GroupNorm, or LayerNorm over the channels of each pixel."""
    if variant < 3:
        return nn.Sequential(conv(at.channels, width), nn.GroupNorm((1, 2, 4)[variant], width), nn.SiLU()), Shape(width, at.size)
    return Net(lambda net, x: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(at.channels)), at


def used_twice(at: Shape, width: int, variant: int) -> Block:
    layer = nn.Sequential(conv_bn(at.channels, width), nn.ReLU(), conv_bn(width, at.channels))
    if variant % 2:
        return Net(lambda net, x: net.layer(F.relu(net.layer(x))), layer=layer), at
    return Net(lambda net, x: net.layer(F.max_pool2d(x, 3, 1, 1)) + F.relu(net.layer(x)), layer=layer), at


def branches(at: Shape, width: int, variant: int) -> Block:
    parts = {"one": conv_bn(at.channels, width), "two": conv(at.channels, width, 1), "three": conv(at.channels, width, 1)}

    def forward(net: Any, x: Tensor) -> Tensor:
        made = [net.one(x), F.relu(net.two(x)), net.three(F.avg_pool2d(x, 3, 1, 1))]
        return torch.stack(made).sum(0) if variant == 3 else made[0] + made[1] + made[2]

    return Net(forward, **parts), Shape(width, at.size)


def gate(at: Shape, width: int, variant: int) -> Block:
    parts = {"value": conv(at.channels, width), "gate": conv(at.channels, 1 if variant == 3 else width, 1)}
    return Net(lambda net, x: net.value(x) * torch.sigmoid(net.gate(x)), **parts), Shape(width, at.size)


def pad(at: Shape, width: int, variant: int) -> Block:
    """Around the picture; or zeros as further channels."""
    if variant < 2:
        return Net(lambda net, x: F.relu(net.layer(F.pad(x, (1, 0, 1, 0)))), layer=nn.Conv2d(at.channels, width, 2)), Shape(width, at.size)
    return Net(lambda net, x: net.layer(x) + F.pad(x, (0, 0, 0, 0, 4, 4)), layer=conv(at.channels, at.channels + 8)), Shape(at.channels + 8, at.size)


def up_and_down(at: Shape, width: int, variant: int) -> Block:
    """Through twice the size, by a transposed convolution or by pixel shuffle, and back."""
    up = nn.ConvTranspose2d(at.channels, width, 2, 2) if variant < 2 else nn.Sequential(conv(at.channels, 4 * width, 1), nn.PixelShuffle(2))
    return nn.Sequential(up, nn.ReLU(), nn.MaxPool2d(2)), Shape(width, at.size)


FEATURE_MAPS: tuple[Maker, ...] = (
    conv_bn_relu,
    residual,
    concat,
    split,
    grouped,
    depthwise,
    squeeze_excite,
    shuffle,
    pool,
    normed,
    used_twice,
    branches,
    gate,
    pad,
    up_and_down,
)


# Sequences: [batch, size, channels] ------------------------------------------------------------------------------------------------


def linear(at: Shape, width: int, variant: int) -> Block:
    return nn.Sequential(nn.Linear(at.channels, width), (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.ELU())[variant]), Shape(width, at.size)


def perceptron(at: Shape, width: int, variant: int) -> Block:
    layers = nn.Sequential(nn.LayerNorm(at.channels), nn.Linear(at.channels, width), nn.GELU(), nn.Linear(width, at.channels))
    return Net(lambda net, x: x + net.layers(x), layers=layers if variant % 2 else layers[1:]), at


def gated_perceptron(at: Shape, width: int, variant: int) -> Block:
    if variant % 2:
        return nn.Sequential(nn.Linear(at.channels, 2 * width), nn.GLU()), Shape(width, at.size)
    parts = {"gate": nn.Linear(at.channels, width), "up": nn.Linear(at.channels, width), "down": nn.Linear(width, at.channels)}
    return Net(lambda net, x: x + net.down(F.silu(net.gate(x)) * net.up(x)), **parts), at


def separate_attention(at: Shape, width: int, variant: int) -> Block:
    """Query, key and value from layers of their own; by matrix products or as one operator; grouped queries in one variant."""
    inner, few = 4 * HEADS, HEADS // 2 if variant == 3 else HEADS
    parts = {"q": nn.Linear(at.channels, inner), "k": nn.Linear(at.channels, 4 * few), "v": nn.Linear(at.channels, 4 * few)}

    def forward(net: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
        if variant == 3:
            k, v = (part[:, :, None].expand(n, few, 2, t, 4).reshape(n, HEADS, t, 4) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v) if variant % 2 else torch.softmax(q @ k.mT / 2, -1) @ v
        return x + net.out(y.transpose(1, 2).reshape(n, t, inner))

    return Net(forward, **parts, out=nn.Linear(inner, at.channels)), at


def fused_attention(at: Shape, width: int, variant: int) -> Block:
    """Query, key and value from one layer: by chunk and view, or by reshape, permute and unbind, with heads or positions of values first."""
    inner = 4 * HEADS
    parts = {"qkv": nn.Linear(at.channels, 3 * inner), "out": nn.Linear(inner, at.channels)}

    def forward(net: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if variant < 2:
            q, k, v = (part.view(n, t, HEADS, 4).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
        elif variant == 2:
            q, k, v = net.qkv(x).reshape(n, t, 3, HEADS, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = net.qkv(x).reshape(n, t, HEADS, 12).transpose(1, 2).split(4, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=variant == 1)
        return x + net.out(y.transpose(1, 2).reshape(n, t, inner))

    return Net(forward, **parts), at


def recurrent(at: Shape, width: int, variant: int) -> Block:
    both = variant >= 2
    rnn = (nn.LSTM, nn.GRU)[variant % 2](at.channels, width, batch_first=True, bidirectional=both)
    return Net(lambda net, x: net.rnn(x)[0], rnn=rnn), Shape(width * (1 + both), at.size)


def sequence_concat(at: Shape, width: int, variant: int) -> Block:
    return Net(lambda net, x: torch.cat([net.layer(x), x], -1), layer=nn.Linear(at.channels, width)), Shape(at.channels + width, at.size)


def sequence_used_twice(at: Shape, width: int, variant: int) -> Block:
    layer = nn.Sequential(nn.Linear(at.channels, width), nn.ReLU(), nn.Linear(width, at.channels))
    return Net(lambda net, x: net.layer(x + net.layer(x)), layer=layer), at


def across(at: Shape, width: int, variant: int) -> Block:
    """Layers along the sequence; or a convolution along it."""
    if variant < 2:
        layers = nn.Sequential(nn.Linear(at.size, width), nn.GELU(), nn.Linear(width, at.size))
        return Net(lambda net, x: x + net.layers(x.transpose(1, 2)).transpose(1, 2), layers=layers), at
    return Net(lambda net, x: net.layer(x.mT).mT, layer=nn.Conv1d(at.channels, width, 3, padding=1)), Shape(width, at.size)


SEQUENCES: tuple[Maker, ...] = (
    linear,
    perceptron,
    gated_perceptron,
    separate_attention,
    fused_attention,
    recurrent,
    sequence_concat,
    sequence_used_twice,
    across,
)


# Whole networks --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One block: which, the width it may use, and the variant of it."""

    make: Maker
    width: int
    variant: int

    def __str__(self) -> str:
        return f"{self.make.__name__}({self.width}, {self.variant})"


@dataclass(frozen=True)
class Plan:
    """``start``: picture, vectors or tokens. ``turns``: the feature map becomes a sequence. ``head``: the variant of the last layers."""

    start: str
    maps: tuple[Step, ...]
    turns: bool
    sequence: tuple[Step, ...]
    head: int
    seed: int

    def __str__(self) -> str:
        return f"{self.start}: {' '.join(map(str, (*self.maps, *self.sequence)))}, turns {self.turns}, head {self.head}, seed {self.seed}"

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        stem, at = self._stem()
        blocks: list[nn.Module] = []
        for step in self.maps:
            block, at = step.make(at, step.width, step.variant)
            blocks.append(block)
        if self.turns:
            blocks.append(Net(lambda net, x: x.flatten(2).transpose(1, 2)))
            at = Shape(at.channels, at.size**2)
        for step in self.sequence:
            block, at = step.make(at, step.width, step.variant)
            blocks.append(block)
        return vivid(nn.Sequential(stem, *blocks, *self._last(stem, at)), self.seed)

    def _stem(self) -> Block:
        if self.start == "picture":
            return conv_bn_relu(Shape(3, PICTURE), 8, 0)
        first: nn.Module = nn.Linear(10, 16) if self.start == "vectors" else nn.Embedding(WORDS, 16)
        return first, Shape(16, TEXT)

    def _last(self, stem: nn.Module, at: Shape) -> list[nn.Module]:
        if self.start == "tokens" and self.head == 3:
            tied = nn.Linear(16, WORDS, bias=False)
            assert isinstance(stem, nn.Embedding)
            tied.weight = stem.weight
            return [nn.Linear(at.channels, 16), tied]
        maps = self.start == "picture" and not self.turns
        if self.head == 0:
            return [nn.Flatten(), nn.Linear(at.channels * at.size ** (2 if maps else 1), CLASSES)]
        if self.head == 1 and maps:
            return [nn.Conv2d(at.channels, CLASSES, 1)]
        pooled: nn.Module = nn.AdaptiveAvgPool2d(1) if maps else Net(lambda net, x: x.mean(1))
        return [pooled, nn.Flatten(), nn.Dropout(0.1), nn.Linear(at.channels, CLASSES)]

    def inputs(self, batch: int) -> Tensor:
        made: dict[str, Callable[[int], Tensor]] = {"picture": images(size=PICTURE), "vectors": floats(TEXT, 10), "tokens": tokens(WORDS, TEXT)}
        return made[self.start](batch)


@st.composite
def networks(draw: st.DrawFn, most: int = 4) -> Specimen:
    """Networks of one to ``most`` blocks of each kind."""

    def steps(makers: tuple[Maker, ...], least: int) -> tuple[Step, ...]:
        step = st.builds(Step, st.sampled_from(makers), st.sampled_from(WIDTHS), st.integers(0, 3))
        return tuple(draw(st.lists(step, min_size=least, max_size=most)))

    start = draw(st.sampled_from(("picture", "vectors", "tokens")))
    maps = steps(FEATURE_MAPS, 1) if start == "picture" else ()
    turns = start == "picture" and draw(st.booleans())
    sequence = steps(SEQUENCES, 1) if turns or start != "picture" else ()
    plan = Plan(start, maps, turns, sequence, draw(st.integers(0, 3)), draw(st.integers(0, 2**16)))
    return Specimen(str(plan), plan.build, plan.inputs)
