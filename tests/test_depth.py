"""Which blocks go: block influence against closed forms, the search against brute force, spans against the original's values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_nets import Net
from test_blocks import transformer, words
from torch import Tensor, nn

from downsize.errors import SpecError, TaskError
from downsize.network.blocks import blocks, bypass
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.pruning.depth import Depth, Span, choose_blocks, influence, main_layers, spans


def deep(count: int, scales: Any = None, width: int = 6) -> tuple[nn.Module, Network]:
    """Residual linear layers of different weight, of which each changes what the others do."""
    torch.manual_seed(1)

    def forward(net: Any, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = x + torch.tanh(layer(x))
        return net.head(x)

    model = Net(forward, layers=nn.ModuleList(nn.Linear(width, width) for _ in range(count)), head=nn.Linear(width, 3))
    with torch.no_grad():
        for number, layer in enumerate(model.get_submodule("layers").children()):
            layer.get_parameter("weight").mul_(2.0 if scales is None else scales[number])
    return model.eval(), capture(model.eval(), torch.randn(2, width))


def pieces(width: int = 6, number: int = 3) -> list[list[Tensor]]:
    return [[torch.randn(8, width, generator=torch.Generator().manual_seed(seed))] for seed in range(number)]


def loss(network: Network, names: Any, data: list[list[Tensor]]) -> float:
    """sum |out - reference|^2 / sum |reference|^2, by definition."""
    made = bypass(network, names)
    with torch.no_grad():
        pairs = [(network.graph_module(*leaves)[0], made.graph_module(*leaves)[0]) for leaves in data]
    error = sum(float((two - one).double().square().sum()) for one, two in pairs)
    return error / sum(float(one.double().square().sum()) for one, _ in pairs)


def values_of(network: Network, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Every node's value, by its name."""
    values: dict[str, Tensor] = {}
    walk(network, leaves, {node: (lambda args, value, node=node: values.__setitem__(node.name, value)) for node in network.graph.nodes})
    return values


# Block influence ------------------------------------------------------------------------------------------------------------------


class Turn(nn.Module):
    """x + f(x) with f(x) = W x - x, so that the exit is W x."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.f = nn.Linear(len(matrix), len(matrix), bias=False)
        self.f.weight = nn.Parameter(matrix - torch.eye(len(matrix)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def rotation(degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_a_rotation_has_the_influence_of_its_angle(degrees):
    model = nn.Sequential(*(Turn(rotation(degree)) for degree in (degrees, 60)))
    x = torch.randn(5, 7, 2)
    got = influence(network := capture(model.eval(), x), blocks(network), [[x], [torch.randn(4, 7, 2)]])
    expected = [1 - float(torch.deg2rad(torch.tensor(float(degree))).cos()) for degree in (degrees, 60)]
    assert list(got.values()) == pytest.approx(expected, abs=1e-6)


def test_influence_is_the_mean_over_positions_that_are_not_padding():
    _, network = transformer(True)
    found, (ids, mask) = blocks(network), words(3)
    got = influence(network, found, [[ids, mask], [ids[:1], torch.zeros_like(mask[:1])], list(words(2))])
    for block in found:
        cosines = []
        for leaves in ((ids, mask), words(2)):
            values = values_of(network, list(leaves))
            one, two = values[block.entry.name], values[block.exit.name]
            cosines += [nn.functional.cosine_similarity(one[i, j], two[i, j], dim=0) for i, j in leaves[1].nonzero().tolist()]
        assert got[block.name] == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-5)


def test_images_have_a_vector_at_every_pixel():
    f = nn.Conv2d(2, 2, 1, bias=False)
    f.weight = nn.Parameter((rotation(90) - torch.eye(2))[:, :, None, None])
    x = torch.randn(2, 2, 3, 3)
    network = capture(Net(lambda net, x: x + net.f(x), f=f).eval(), x)
    assert list(influence(network, blocks(network), [[x]]).values()) == pytest.approx([1.0], abs=1e-6)


def test_vectors_of_length_zero():
    network = capture(nn.Sequential(Turn(torch.zeros(2, 2))).eval(), torch.randn(2, 2))
    found = blocks(network)
    # Nothing stays nothing: the same direction. Something that becomes nothing has no direction in common with it.
    assert list(influence(network, found, [[torch.tensor([[0.0, 0.0], [1.0, 2.0]])]]).values()) == [0.5]


def test_only_padding_is_refused():
    _, network = transformer(True)
    ids, mask = words(2)
    with pytest.raises(TaskError, match="no position"):
        influence(network, blocks(network), [[ids, torch.zeros_like(mask)]])


# The choice -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remaining", range(4))
def test_the_best_layers_are_those_of_brute_force(remaining):
    _, network = deep(4)
    data = pieces()
    names = [block.name for block in blocks(network)]
    errors = {gone: loss(network, gone, data) for gone in itertools.combinations(names, 4 - remaining)}
    best = min(errors, key=errors.__getitem__)
    chosen = choose_blocks(network, data, layers=remaining)
    assert chosen.names == best
    assert chosen.error == pytest.approx(errors[best], rel=1e-5)


def test_greedy_takes_the_least_error_at_every_step_measured_anew():
    _, network = deep(4)
    data = pieces()
    left = [block.name for block in blocks(network)]
    gone: list[str] = []
    for name, error in choose_blocks(network, data, layers=0, subsets=0).path:
        errors = {other: loss(network, [*gone, other], data) for other in left}
        assert name == min(errors, key=errors.__getitem__)
        assert error == pytest.approx(errors[name], rel=1e-5)
        gone.append(name)
        left.remove(name)
    assert not left


def test_effects_that_cancel_are_found_by_all_subsets_only():
    # One layer adds what another takes away: greedy spares both, since each alone is large.
    def forward(net: Any, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = x + layer(x.detach() * 0 + 1)
        return x

    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(4))
    for layer, value in zip(layers, (5.0, -5.0, 1.0, 1.5), strict=True):
        layer.weight = nn.Parameter(torch.tensor([[value]]))
    network = capture(Net(forward, layers=layers).eval(), torch.randn(2, 1))
    data = [[torch.randn(8, 1)]]
    assert choose_blocks(network, data, layers=2, subsets=0).names == ("layers.2", "layers.3")
    both = choose_blocks(network, data, layers=2)
    assert both.names == ("layers.0", "layers.1") and both.error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("amount", ["macs", "parameters"])
@pytest.mark.parametrize("most", [0.9, 0.6, 0.3])
def test_a_fraction_is_reached_and_is_the_real_one(amount, most):
    _, network = transformer(False)
    inputs = words(2)
    amounts: Any = {amount: most}
    chosen = choose_blocks(network, [list(inputs)], **amounts)
    before, after = count(network, inputs), count(bypass(network, chosen.names), inputs)
    assert chosen.macs == pytest.approx(after.macs / before.macs)
    assert chosen.parameters == pytest.approx(after.parameters / before.parameters)
    assert getattr(chosen, amount) <= most


def test_the_fraction_is_reached_with_the_error_of_brute_force():
    _, network = transformer(True, (0, 1))
    inputs = words(2)
    data = [list(inputs), list(words(3))]
    found = blocks(network)
    whole = count(network, inputs).macs
    reached = {}
    for size in (1, 2):
        for gone in itertools.combinations(found, size):
            if not any(one.crosses(two) or one.contains(two) or two.contains(one) for one, two in itertools.combinations(gone, 2)):
                names = tuple(block.name for block in gone)
                if count(bypass(network, names), inputs).macs <= 0.75 * whole:
                    reached[names] = loss(network, names, data)
    chosen = choose_blocks(network, data, macs=0.75, subsets=1000)
    same_size = {names: error for names, error in reached.items() if len(names) == len(chosen.names)}
    assert chosen.error <= min(same_size.values()) * (1 + 1e-5)


def test_a_layer_that_does_nothing_goes_first():
    _, network = deep(4, scales=(1.0, 1.0, 0.0, 1.0))
    model_bias = network.tensor("layers.2.bias")
    with torch.no_grad():
        model_bias.zero_()
    chosen = choose_blocks(network, pieces(), layers=3)
    assert (chosen.names, chosen.error) == (("layers.2",), 0.0)


def test_amounts_that_make_no_sense_are_refused():
    _, network = deep(3)
    wrong: list[Any] = [{}, {"macs": 0.5, "layers": 1}, {"macs": 1.5}, {"parameters": 0.0}, {"layers": 4}, {"layers": -1}]
    for amounts in wrong:
        with pytest.raises(SpecError, match="expected one of them"):
            choose_blocks(network, pieces(), **amounts)
    with pytest.raises(SpecError, match=r"macs=0\.01 cannot be reached.*0\.143 remain"):
        choose_blocks(network, pieces(), macs=0.01)  # the head has 18 of 126 MACs a sample


def test_outputs_without_values_to_compare_are_refused():
    network = capture(Net(lambda net, x: (x + net.f(x)).argmax(1), f=nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    with pytest.raises(TaskError, match="no float output"):
        choose_blocks(network, [[torch.randn(2, 4)]], layers=0)


# Layers and spans -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [True, False])
def test_main_layers_are_neither_stacks_nor_parts_of_layers(pre):
    layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=pre, batch_first=True)
    stack = nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=False)
    network = capture(nn.Sequential(nn.Linear(8, 8), stack, nn.Linear(8, 2)).eval(), torch.randn(2, 5, 8))
    found = blocks(network)
    assert {"0", "1"} <= {block.name for block in found}
    assert [block.name for block in main_layers(found)] == [f"1.layers.{number}" for number in range(3)]


def test_without_residual_branches_the_smallest_layers_count():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))).eval()
    network = capture(model, torch.randn(2, 4))
    assert [block.name for block in main_layers(blocks(network))] == ["0.0", "1.0"]


def test_a_span_holds_all_layers_in_a_row():
    _, network = transformer(False)
    found = {block.name: block for block in blocks(network)}
    ends = [found[f"layers.{number}"].exit.name for number in range(3)]
    start = found["layers.0"].entry.name
    picked = [found[name] for name in ("layers.2", "layers.0", "layers.1.ffn", "layers.1")]
    assert spans(picked) == (Span(start, ends[2]),)
    assert spans([found["layers.2"], found["layers.0"]]) == (Span(start, ends[0]), Span(ends[1], ends[2]))
    assert spans([]) == ()


def test_with_the_spans_values_put_in_place_the_student_is_the_teacher():
    # What a repair is to reach: the student's node as the teacher's.
    _, network = transformer(False)
    leaves = list(words(3))
    chosen = choose_blocks(network, [leaves], layers=1)
    assert isinstance(chosen, Depth) and chosen.error > 0
    student = bypass(network, chosen.names)
    teacher, expected = values_of(network, leaves), walk(network, leaves, {})
    nodes = {node.name: node for node in student.graph.nodes}
    put = {nodes[span.student]: (lambda args, value, span=span: teacher[span.teacher]) for span in chosen.spans}
    assert torch.equal(walk(student, leaves, put)[0], expected[0])
    assert not torch.equal(walk(student, leaves, {})[0], expected[0])
