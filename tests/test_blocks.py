"""Blocks that can be taken out: against the module built without them, and against a walk in which the exit takes the entry's value."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_nets import Net, conv, task_of
from torch import Tensor, fx, nn
from zoo import BY_NAME, assert_close, run, specimen

from downsize.network.blocks import Block, _tandems, blocks, bypass, outermost, without
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.testing import check_technique, loaded_equals_live

WIDTH, HEADS = 8, 2
WITH_BLOCKS = ("residual", "dense", "vit", "encoder", "gpt2", "bert", "llama", "resnet", "segformer")
WITHOUT_BLOCKS = ("plain", "depthwise", "squeeze_excite", "unet", "lstm", "gru", "tied", "fusion", "text")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None] > 0)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """A transformer layer; ``parts`` says which of its branches it has."""

    def __init__(self, pre: bool) -> None:
        super().__init__()
        self.pre, self.parts = pre, {"attention", "ffn"}
        self.attention, self.ffn = Attention(), nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attention(self.norm1(x), mask) if "attention" in self.parts else x
            return x + self.ffn(self.norm2(x)) if "ffn" in self.parts else x
        x = self.norm1(x + self.attention(x, mask) if "attention" in self.parts else x)
        return self.norm2(x + self.ffn(x) if "ffn" in self.parts else x)


class Skipped(nn.Module):
    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x


class Transformer(nn.Module):
    def __init__(self, pre: bool, order: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.order = nn.Embedding(50, WIDTH), order
        self.layers = nn.ModuleList(Layer(pre) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.3, 0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        for number in self.order:
            x = self.layers[number](x, mask)
        return self.head(self.norm(x))


def words(batch: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 50, (batch, 7), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    return ids, mask


def transformer(pre: bool, order: tuple[int, ...] = (0, 1, 2)) -> tuple[Transformer, Network]:
    """A module of one's own, and its Network."""
    return Transformer(pre, order).eval(), _captured(pre, order)


@functools.cache
def _captured(pre: bool, order: tuple[int, ...]) -> Network:
    torch.set_num_threads(1)
    return capture(Transformer(pre, order).eval(), words(2))


def regions(network: Network, kind: str = "") -> dict[str, tuple[str, str]]:
    return {block.name: (block.entry.name, block.exit.name) for block in blocks(network) if kind in block.kind}


def names(network: Network, kind: str = "") -> list[str]:
    return list(regions(network, kind))


def short_circuited(network: Network, removed: Sequence[Block], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """What the network gives when every exit takes the value of its entry, all nodes in place."""
    kept: dict[fx.Node, Tensor] = {}
    entries, exits = {block.entry for block in removed}, {block.exit: block.entry for block in removed}

    def hook(node: fx.Node) -> Any:
        def swap(args: tuple[Any, ...], value: Tensor) -> Tensor | None:
            value = kept[exits[node]] if node in exits else value
            if node in entries:
                kept[node] = value
            return value if node in exits else None

        return swap

    return walk(network, leaves, {node: hook(node) for node in entries | set(exits)})


def without_metadata(network: Network) -> Network:
    made = network.fork()
    for node in made.graph.nodes:
        node.meta = {}
    return made


# The module without the block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("gone", [[1], [0, 1], [0, 2], [0, 1, 2]], ids=str)
def test_without_layers_it_is_the_module_without_them(pre, gone):
    model, network = transformer(pre)
    made = bypass(network, [f"layers.{number}" for number in gone])
    for number in gone:
        model.layers[number] = Skipped()
    for batch in (1, 2, 5):
        assert_close(made.predict(words(batch)), run(model, words(batch)))
    left = {name.split(".")[1] for name, _ in made.named_tensors() if name.startswith("layers.")}
    assert left == {str(number) for number in range(3) if number not in gone}


@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("also", [[], ["layers.2"]], ids=str)
def test_without_a_branch_it_is_the_module_without_it(pre, part, also):
    model, network = transformer(pre)
    made = bypass(network, [f"layers.1.{part}", *also])
    model.layers[1].parts = model.layers[1].parts - {part}  # type: ignore[operator, assignment]
    for name in also:
        model.layers[int(name[-1])] = Skipped()
    for batch in (1, 3):
        assert_close(made.predict(words(batch)), run(model, words(batch)))
    assert not any(name.startswith(f"layers.1.{part}") for name, _ in made.named_tensors())


@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
def test_all_blocks_of_a_transformer_are_found(pre):
    _, network = transformer(pre)
    assert names(network) == [name for i in range(3) for name in (f"layers.{i}", f"layers.{i}.attention", f"layers.{i}.ffn")]
    assert names(network, "layer") == [f"layers.{i}" for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("gone", [["layers.1"], ["layers.0.attention", "layers.2"], ["layers.0", "layers.1", "layers.2"]], ids=str)
def test_the_contract_of_techniques_holds(pre, gone, tmp_path):
    model, network = transformer(pre)
    # Saved, loaded, exported and run in ONNX Runtime at batches of 1 and 3; without any layer the mask is an input that nothing reads.
    check_technique(lambda network, task: bypass(network, gone), network, task_of(model, words(2)), tmp_path)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2, self.relu = conv(outputs, outputs, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.skip = None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.skip is None else self.skip(x)
        return self.relu(y)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, 2), BasicBlock(8, 8), BasicBlock(8, 8))
    return nn.Sequential(conv(3, 4), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def test_residual_blocks_go_and_those_with_a_projection_stay():
    model, x = resnet(), torch.randn(2, 3, 8, 8)
    network = capture(model, x)
    assert names(network, "layer") == ["1.0", "1.2", "1.3"]
    assert len(names(network, "branch")) == 3
    made = bypass(network, ["1.0", "1.2"])
    for number in (0, 2):
        model[1][number] = nn.Identity()  # type: ignore[index]
    trial = torch.randn(5, 3, 8, 8)
    assert_close(made.predict(trial), run(model, trial))
    loaded_equals_live(made, x)


def test_a_layer_that_is_added_goes_with_its_sum():
    def forward(net: Any, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = x + layer(x)
        return x

    model = Net(forward, layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    x = torch.randn(2, 4)
    network = capture(model.eval(), x)
    assert [(block.name, block.kind) for block in blocks(network)] == [(f"layers.{i}", "layer") for i in range(3)]
    one, _, three = model.get_submodule("layers").children()
    expected = x + one(x)
    assert_close(bypass(network, ["layers.1"]).predict(x), (expected + three(expected)).detach())


# Layers that run twice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("order", [(0, 0), (1, 0, 0, 2, 0)], ids=str)
def test_each_call_of_a_shared_layer_is_a_block(pre, order):
    model, network = transformer(pre, order)
    layers = [block for block in blocks(network) if block.kind == "layer"]
    assert len(layers) == len(order)
    for number, block in enumerate(layers):
        shared = order.count(order[number]) > 1
        assert block.name == f"layers.{order[number]}" + (f":{block.exit.name}" if shared else "")
        # The tensors stay as long as another call reads them.
        assert (block.parameters == 0) == shared
        model.order = [*order[:number], *order[number + 1 :]]
        assert_close(bypass(network, [block.name]).predict(words(3)), run(model, words(3)))


# Every specimen -------------------------------------------------------------------------------------------------------------------


QUICK = ("residual", "vit")
SLOWLY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WITH_BLOCKS]


@pytest.mark.parametrize("metadata", [True, False], ids=["with paths", "without"])
@pytest.mark.parametrize("name", SLOWLY)
def test_bypassed_equals_short_circuited(name, metadata):
    network = specimen(name)[1]
    network = network if metadata else without_metadata(network)
    found = blocks(network)
    assert len({block.name for block in found}) == len(found) > 0 or (not metadata and name in ("residual", "dense"))
    chance = random.Random(0)
    trials = [[block] for block in found] + [chance.sample(found, size) for size in (2, 3, 4) if size <= len(found) for _ in range(3)]
    for removed in trials:
        if any(one.crosses(two) for one, two in itertools.combinations(removed, 2)):
            continue
        made = without(network, removed)
        assert not {node.name for node in made.graph.nodes} & {node.name for block in removed for node in block.nodes}
        for batch in (1, 3):
            leaves = network.flat(BY_NAME[name].inputs(batch))
            for got, expected in zip(walk(made, leaves, {}), short_circuited(network, outermost(removed), leaves), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("name", SLOWLY)
def test_what_a_block_saves_is_what_the_cost_falls_by(name):
    network, inputs = specimen(name)[1], BY_NAME[name].inputs(2)
    before = count(network, inputs)
    for block in blocks(network):
        after = count(without(network, [block]), inputs)
        assert (block.macs, block.parameters) == (before.macs - after.macs, before.parameters - after.parameters)
        assert block.macs > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_specimen_obeys_the_contract_without_a_block(name, tmp_path):
    """Of one specimen without its first block, of the next without its last."""
    model, network = specimen(name)
    block = blocks(network)[-(WITH_BLOCKS.index(name) % 2)]
    check_technique(lambda network, task: bypass(network, [block.name]), network, task_of(model, BY_NAME[name].inputs(2)), tmp_path)


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_where_nothing_can_go_nothing_is_listed(name):
    assert blocks(specimen(name)[1]) == ()


def test_a_dense_net_has_only_inner_blocks():
    # Of the two layers only the convolutions between as many channels; what is concatenated has other sizes.
    assert names(specimen("dense")[1], "branch") == []


@pytest.mark.parametrize("name", ["encoder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bert", "llama"))])
def test_layers_are_found_by_structure_where_metadata_is_missing(name):
    network = specimen(name)[1]
    assert set(regions(without_metadata(network)).values()) == set(regions(network).values())


def test_repeated_units_are_primitive_and_aligned_to_the_end_of_their_run():
    for text in ("".join(letters) for size in range(1, 9) for letters in itertools.product("ab", repeat=size)):
        got = set(_tandems(text))
        for start, period in itertools.product(range(len(text)), range(1, len(text) + 1)):
            unit = text[start : start + period]
            primitive = not any(period % p == 0 and unit == unit[:p] * (period // p) for p in range(1, period))
            # The run: as far as every letter equals the one a period later.
            low, high = start, start
            while low > 0 and text[low - 1] == text[low - 1 + period : low + period]:
                low -= 1
            while high + period < len(text) and text[high] == text[high + period]:
                high += 1
            aligned = start + period <= high + period and (high + period - start) % period == 0
            expected = len(unit) == period and primitive and aligned and high + period - low >= 2 * period
            assert ((start, period) in got) == expected, (text, start, period)
