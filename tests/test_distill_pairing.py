"""Layers of students and teachers that belong together, on pairs that are known."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, floats, images, specimen, tokens

from downsize.network.blocks import blocks, bypass
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.rewrite import drop_identities, fold_batch_norm
from downsize.network.statistics import Pieces
from downsize.training.features import features, shared_heads
from downsize.training.pairing import aligned, layers, pair
from downsize.training.students import narrow


def pieces(network: Network, make, count: int = 4) -> Pieces:
    return Pieces.of(network, [(make(8 + i), None) for i in range(count)])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Residual layers on tokens under any names."""

    def __init__(self, depth: int, width: int = 12, names=None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.names = names or [f"layer{i}" for i in range(depth)]
        for name in self.names:
            self.add_module(name, Block(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x.mean(1))


def tower(depth: int, **options) -> Tower:
    torch.manual_seed(depth)
    return Tower(depth, **options).eval()


TOWER = floats(5, 6)


# Layers -----------------------------------------------------------------------------------------------------------------------------


def test_layers_are_the_stations_that_all_data_passes():
    def named(name: str) -> list[tuple[str, str, int]]:
        return [(layer.name, layer.kind, layer.channels) for layer in layers(specimen(name)[1])]

    assert named("plain") == [("max_pool2d", "map", 1), ("relu__1", "map", 1)]
    assert named("residual") == [("relu_", "map", 1), ("relu__2", "map", 1)]
    # the padding mask runs past all of them
    assert named("encoder") == [
        *((name, "tokens", 2) for name in ("layer_norm", "layer_norm_1", "layer_norm_2", "layer_norm_3")),
        ("mean", "vector", 1),
    ]
    assert named("bert")[:4] == [(f"layer_norm_{i}", "tokens", 2) for i in (1, 2, 3, 4)]
    assert named("vit")[0] == ("conv2d", "map", 1) and named("vit")[1:] == [(name, "tokens", 2) for name in ("add", "add_1", "add_2")]


@pytest.mark.parametrize("name", [one.name for one in ZOO])
def test_layers_are_as_they_say(name):
    network = specimen(name)[1]
    nodes = {node.name: node for node in network.graph.nodes}
    outputs = network.graph.output_node().all_input_nodes
    for layer in layers(network):
        value = nodes[layer.name].meta.get("val")
        assert nodes[layer.name] not in outputs
        if value is not None:
            assert int(value.shape[layer.channels]) == layer.width
    assert len({layer.name for layer in layers(network)}) == len(layers(network))


# Pairs ------------------------------------------------------------------------------------------------------------------------------


def test_alignment_against_all_monotone_matchings():
    numbers = random.Random(0)
    for _ in range(60):
        first, second = numbers.randint(1, 4), numbers.randint(1, 4)
        scores = {place: numbers.random() for place in itertools.product(range(first), range(second)) if numbers.random() < 0.7}
        found = aligned(scores, first, second)
        matchings = [
            list(zip(rows, columns, strict=True))
            for size in range(min(first, second) + 1)
            for rows in itertools.combinations(range(first), size)
            for columns in itertools.combinations(range(second), size)
        ]
        best = max(sum(scores[place] for place in places) for places in matchings if all(place in scores for place in places))
        assert sum(scores[place] for place in found) == pytest.approx(best, rel=1e-12)
        assert all(i < k and j < m for (i, j), (k, m) in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["plain", "residual", "vit", "encoder", "bert", "gpt2", "resnet", "segformer"])
def test_a_copy_is_paired_with_itself(name):
    one = next(one for one in ZOO if one.name == name)
    network = specimen(name)[1]
    for derived in (True, False):
        found, _ = pair(network.copy(), network, pieces(network, one.inputs), derived)
        assert [(each.student.name, each.teacher.name) for each in found] == [(layer.name, layer.name) for layer in layers(network)]
        assert all(each.similarity == pytest.approx(1, abs=1e-4) for each in found)


def test_a_narrow_student_is_paired_by_name_and_one_with_folded_norms_by_place():
    network = specimen("plain")[1]
    student = narrow(network)
    drop_identities(student)
    fold_batch_norm(student)
    found, _ = pair(student, network, pieces(network, images()), derived=True)
    assert [(one.student.name, one.student.width, one.teacher.name, one.teacher.width) for one in found] == [
        ("max_pool2d", 4, "max_pool2d", 8),
        ("relu__1", 6, "relu__1", 12),
    ]
    network = specimen("depthwise")[1]
    folded = network.fork()
    drop_identities(folded)
    fold_batch_norm(folded)
    names = [(one.student.name, one.teacher.name) for one in pair(folded, network, pieces(network, images()), derived=True)[0]]
    assert names == [("pad", "pad"), ("hardtanh_", "hardtanh_"), ("conv2d_2", "batch_norm_2")]


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_shallow_student_that_is_the_teachers_beginning_is_found_whatever_its_names(depth):
    teacher = tower(6)
    names = [f"{'zebra' if i % 2 else 'ant'}{9 - i}" for i in range(depth)]
    student = tower(depth, names=names)
    student.embed.load_state_dict(teacher.embed.state_dict())
    for i, name in enumerate(names):
        getattr(student, name).load_state_dict(getattr(teacher, f"layer{i}").state_dict())
    one, two = capture(student, TOWER(2)), capture(teacher, TOWER(2))
    found, _ = pair(one, two, pieces(one, TOWER), derived=False)
    mine, theirs = ([layer.name for layer in layers(network) if layer.kind == "tokens"] for network in (one, two))
    assert len(mine) == depth + 1 and len(theirs) == 7
    expected = list(zip(mine, theirs, strict=False))
    assert [(each.student.name, each.teacher.name) for each in found if each.student.kind == "tokens"] == expected


def test_layers_that_were_left_out_leave_the_others_with_their_namesakes():
    teacher = capture(tower(6), TOWER(2))
    left = [block.name for block in blocks(teacher)][1::2]
    student = bypass(teacher, left)
    assert len(left) == 3
    found, _ = pair(student, teacher, pieces(teacher, TOWER), derived=True)
    assert [one.student.name for one in found] == [one.teacher.name for one in found] == [layer.name for layer in layers(student)]
    gone = {layer.name for layer in layers(teacher)} - {one.teacher.name for one in found}
    assert len(gone) == 3


def test_other_widths_pair_by_what_they_say():
    # A rotation into more dimensions keeps every inner product: linear CKA is 1.
    teacher = tower(3)
    network = capture(teacher, TOWER(2))
    wide = copy.deepcopy(teacher)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.turn = wide, nn.Linear(12, 30, bias=False)
            nn.init.orthogonal_(self.turn.weight)
            self.back = nn.Linear(30, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner.embed(x)
            for name in ("layer0", "layer1"):
                x = getattr(self.inner, name)(x)
            return self.back(self.turn(x).mean(1))

    student = capture(Turned().eval(), TOWER(2))
    found, _ = pair(student, network, pieces(network, TOWER), derived=False)
    wider = [one for one in found if one.student.width == 30 and one.student.kind == "tokens"]
    assert len(found) >= 3 and all(one.similarity > 0.3 for one in found)
    assert all(one.teacher.kind == "tokens" for one in wider)


def test_maps_and_tokens_of_other_sizes_are_no_pairs():
    plain, encoder = specimen("plain")[1], specimen("encoder")[1]
    assert {layer.kind for layer in layers(plain)} == {"map"}
    small = capture(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval(), images()(2))
    assert [layer.positions for layer in layers(small)] == [(4, 4)]
    found, _ = pair(small, plain, pieces(small, images()), derived=False)
    assert [(one.student.positions, one.teacher.positions) for one in found] == [((4, 4), (4, 4))]
    assert {layer.kind for layer in layers(encoder)} == {"tokens", "vector"}


def test_padding_is_not_compared():
    network = specimen("bert")[1]
    ids = tokens(length=9)(8)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    leaves = network.flat({"input_ids": ids, "attention_mask": mask})
    port = next(i for i, port in enumerate(network.ports) if "mask" in port.name)
    other = network.flat({"input_ids": torch.where(mask.bool(), ids, 49), "attention_mask": mask})
    one = pair(network, network, Pieces.of(network, [({"input_ids": leaves[1 - port], "attention_mask": mask}, None)]), True, port)[1]
    two = pair(network, network, Pieces.of(network, [({"input_ids": other[1 - port], "attention_mask": mask}, None)]), True, port)[1]
    for name, rows in one.student.items():
        assert torch.allclose(rows, two.student[name], atol=1e-5)


def test_a_regressor_begins_as_the_least_squares_fit():
    network = specimen("plain")[1]
    student = narrow(network)
    made = features("hint", student, network, pieces(network, images()), True, None)
    shapes = [tuple(parameter.shape) for parameter in made.parameters()]
    assert shapes == [(8, 4), (8,), (12, 6), (12,)]
    _, rows = pair(student, network, pieces(network, images()), True)
    x, y = rows.student["relu__1"].double(), rows.teacher["relu__1"].double()
    wide = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = float((wide @ torch.linalg.pinv(wide) @ y - y).square().sum())
    layer: Any = cast(Any, made).regressors[1]
    assert float((layer(x.float()) - y).detach().square().sum()) == pytest.approx(best, rel=1e-3)


def test_heads_that_both_widths_can_be_split_into():
    for one, two, most in itertools.product((12, 16, 10, 7), (12, 24, 15, 5), (1, 3, 4, 12)):
        expected = max(h for h in range(1, most + 1) if one % h == 0 and two % h == 0)
        assert shared_heads(one, two, most) == expected
