"""Refitting: the targets by hand, the order by running everything again for every layer, and what it is worth on networks that were cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import Net, conv
from torch import Tensor, fx, nn
from zoo import images, masked_tokens, specimen

from downsize.network.capture import capture
from downsize.network.columns import groups_of, input_rows, output_rows, weight_matrix
from downsize.network.goals import goals_of
from downsize.network.judge import Judge
from downsize.network.network import Network
from downsize.network.rewrite import constant, fold_batch_norm, set_constant
from downsize.network.statistics import walk
from downsize.numerics.refit import Moments, best_refit
from downsize.pruning import refitting
from downsize.pruning.refitting import Refitted, refit_layers


def pieces_of(network: Network, make: Any, sizes: tuple[int, ...]) -> list[list[Tensor]]:
    return [network.flat(make(size)) for size in sizes]


def floats(*shape: int) -> Any:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def node(network: Network, name: str) -> fx.Node:
    return next(one for one in network.graph.nodes if one.name == name)


def weight_of(network: Network, layer: str) -> Tensor:
    return network.tensor(str(node(network, layer).args[1].target)).detach()  # type: ignore[union-attr]


def replace(network: Network, layer: str, change: Any, position: int = 1) -> None:
    source = node(network, layer).args[position]
    assert isinstance(source, fx.Node)
    set_constant(network, source, change(network.tensor(str(source.target)).detach()))


def narrow(network: Network, first: str, second: str, keep: Tensor) -> None:
    """Keep those of the units between two layers: rows (and biases) of the first, input channels of the second."""
    for position in (1, 2):
        replace(network, first, lambda tensor: tensor[keep], position)
    replace(network, second, lambda tensor: tensor[:, keep])
    network.recompile()


def by_layer(results: list[Refitted]) -> dict[str, Refitted]:
    return {result.layer: result for result in results}


# Targets -----------------------------------------------------------------------------------------------------------------------------


def goals(forward: Any, x: Tensor, layers: list[str] | None = None, **parts: nn.Module) -> dict[str, tuple[str, str, list[str]]]:
    network = capture(Net(forward, **parts).eval(), x)
    found = goals_of(network, network.fork(), layers, {}, {})
    return {goal.layer.name: (goal.form if not goal.reason else "none", goal.target.name, [other.name for other in goal.others]) for goal in found}


def pair_of() -> dict[str, Any]:
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        # Straight into a sum whose other summand is there: to the sum. Both layers wait for each other: the later one.
        (lambda net, x: x + net.b(net.a(x).relu()), ("sum", "add", ["x_0"])),
        (lambda net, x: net.b(net.a(x).relu()) + x, ("sum", "add", ["x_0"])),
        (lambda net, x: net.a(x) + net.b(x), ("sum", "add", ["linear"])),
        # Several sums in a row; one of a constant.
        (lambda net, x: (net.b(x) + net.a(x.relu()).exp()) + x, ("output", "linear", [])),
        (lambda net, x: x + (net.a(x).exp() + net.b(x)), ("sum", "add_1", ["exp", "x_0"])),
        (lambda net, x: x + net.b(net.a(x)) + net.a.bias, ("sum", "add_1", ["x_0", "{bias}"])),
        # Through what hands it on, not through what does not.
        (lambda net, x: x + torch.dropout(net.b(net.a(x)), 0.5, False), ("sum", "add", ["x_0"])),
        (lambda net, x: x + net.b(net.a(x)).relu(), ("output", "linear_1", [])),
        (lambda net, x: x + net.b(net.a(x)) * 2, ("output", "linear_1", [])),
        # Read by others too, scaled in the sum, twice in it, or spread by it.
        (lambda net, x: (lambda y: x + y + y.exp())(net.b(net.a(x))), ("output", "linear_1", [])),
        (lambda net, x: torch.add(x, net.b(net.a(x)), alpha=2), ("output", "linear_1", [])),
        (lambda net, x: (lambda y: y + y)(net.b(net.a(x))), ("output", "linear_1", [])),
        (lambda net, x: x[:, None] + net.b(net.a(x)), ("output", "linear_1", [])),
        (lambda net, x: net.b(net.a(x)) + 1.0, ("output", "linear_1", [])),
    ],
)
def test_what_a_layer_should_give(forward, expected):
    found = goals(forward, torch.randn(3, 4), **pair_of())
    layer = "linear" if expected[1] == "linear" else "linear_1"
    form, target, others = found[layer]
    assert (form, target) == expected[:2] and len(others) == len(expected[2])
    assert all(one == two or two == "{bias}" for one, two in zip(others, expected[2], strict=True))


def test_targets_keep_the_order_of_the_layers():
    # The sum comes behind b, so that a can only be fitted to its own output, unless b is not asked for.
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        z = net.b(x).exp()
        return (x + y) * z

    assert goals(forward, torch.randn(3, 4), **pair_of())["linear"] == ("output", "linear", [])
    assert goals(forward, torch.randn(3, 4), ["linear"], **pair_of()) == {"linear": ("sum", "add", ["x_0"])}


def test_layers_that_cannot_be_refitted_say_why():
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.a(net.a(x)) + nn.functional.linear(x, net.b.weight * 2) + net.c(x)

    network = capture(Net(forward, **pair_of(), c=nn.Linear(4, 4)).eval(), torch.randn(3, 4))
    student = network.copy()
    assert [goal.layer.name for goal in goals_of(network, student, None, {}, {})] == ["linear_3"]
    names = ["linear", "linear_1", "linear_2", "add"]
    reasons = {goal.layer.name: goal.reason for goal in goals_of(network, student, names, {}, {})}
    assert reasons["linear"] == reasons["linear_1"] == "others read its weight too"
    assert reasons["linear_2"] == "its weight or bias is computed"
    assert reasons["add"] == "it is neither a linear layer nor a convolution"
    with pytest.raises(ValueError, match="nowhere is no node of the student"):
        refit_layers(network, student, [], [], ["nowhere"])
    with pytest.raises(ValueError, match="the span from nowhere to add is not there"):
        refit_layers(network, network.fork(), [], [], spans={"nowhere": "add"})


def test_fewer_outputs_than_the_teachers_need_rows():
    teacher = capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.randn(2, 4))
    student = teacher.copy()
    keep = torch.tensor([4, 0, 1])
    narrow(student, "linear", "linear_1", keep)
    replace(student, "linear", lambda weight: weight + 0.5)
    fit, held = pieces_of(teacher, floats(4), (40, 41)), pieces_of(teacher, floats(4), (42,))
    results = by_layer(refit_layers(teacher, student.copy(), fit, held))
    assert results["linear"].note == "its outputs are not the teacher's: say which rows they are" and results["linear_1"].form == "output"
    results = by_layer(refit_layers(teacher, student, fit, held, rows={"linear": keep}))
    assert results["linear"].after < 1e-6 < results["linear"].before
    assert torch.allclose(weight_of(student, "linear"), weight_of(teacher, "linear")[keep], atol=1e-3)


# Against other ways to the same ------------------------------------------------------------------------------------------------------


def recorded(network: Network, pieces: list[list[Tensor]], *names: str) -> list[dict[str, Any]]:
    """For each piece the arguments and the value of the nodes of those names."""
    return [recorded_piece(network, leaves, names) for leaves in pieces]


def recorded_piece(network: Network, leaves: list[Tensor], names: tuple[str, ...]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    walk(network, leaves, {node(network, name): lambda args, value, name=name: seen.__setitem__(name, (args, value)) for name in names})
    return seen


def by_hand(teacher: Network, student: Network, parts: list[list[list[Tensor]]], layer: str, target: str, others: list[str]) -> tuple[Tensor, Tensor]:
    """The refit of one layer, everything run again from the start: moments of all positions of all pieces, then ``best_refit``."""
    one = node(student, layer)
    moments, visit = [], 0
    for pieces in parts:
        groups = groups_of(one)
        matrix = weight_matrix(weight_of(student, layer), groups)
        moments.append(Moments.zero(*matrix.shape))
        for mine, theirs in zip(recorded(student, pieces, layer, *others), recorded(teacher, pieces, target), strict=True):
            wanted = theirs[target][1] - sum(mine[other][1] for other in others)
            moments[-1].add(input_rows(one, mine[layer][0], groups, visit), output_rows(one, wanted, groups, visit))
            visit += 1
    bias = student.tensor(str(one.args[2].target)).detach()  # type: ignore[union-attr]
    made, moved, *_ = best_refit(moments[0], moments[1], matrix, bias.reshape(matrix.shape[:2]))
    assert moved is not None
    return made.reshape(weight_of(student, layer).shape), moved.reshape(-1)


class Blocks(nn.Module):
    """A stem, residual blocks of two convolutions or linear layers, and a head."""

    def __init__(self, wide: bool, blocks: int = 2, normed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = (lambda i, o: conv(i, o)) if wide else nn.Linear
        self.stem, self.head, self.wide = make(3, 6), nn.Linear(6, 4), wide
        self.one, self.two = (nn.ModuleList(make(*sizes) for _ in range(blocks)) for sizes in ((6, 12), (12, 6)))
        self.norms = nn.ModuleList(nn.LayerNorm(6) if normed else nn.Identity() for _ in range(blocks))
        for norm in self.norms:
            for tensor in norm.parameters():
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one, two, norm in zip(self.one, self.two, self.norms, strict=True):
            x = norm(x + two(torch.relu(one(x))))
        return self.head(x.mean((2, 3)) if self.wide else x)


KEEP = torch.tensor([0, 2, 3, 6, 7, 10])


def pruned(wide: bool) -> tuple[Network, Network, Any, list[tuple[str, str]]]:
    """A network, the same with half the units of each block, what makes its inputs, and the pairs of layers that were cut."""
    make = images(3, 8) if wide else floats(3)
    teacher = capture(Blocks(wide).eval(), make(2))
    student = teacher.copy()
    kind = "conv2d" if wide else "linear"
    cut = [(f"{kind}_1", f"{kind}_2"), (f"{kind}_3", f"{kind}_4")]
    for first, second in cut:
        narrow(student, first, second, KEEP)
    return teacher, student, make, cut


@pytest.mark.parametrize("wide", [False, True], ids=["linear", "convolutions"])
def test_one_pass_gives_what_running_everything_again_for_every_layer_gives(wide):
    teacher, student, make, cut = pruned(wide)
    fit, held = pieces_of(teacher, make, (30, 7, 31)), pieces_of(teacher, make, (32, 8))
    expected = student.copy()
    rows = {first: KEEP for first, _ in cut}
    results = refit_layers(teacher, student, fit, held, rows=rows)
    stem, head = ("conv2d", "linear") if wide else ("linear", "linear_5")
    assert [(result.layer, result.form) for result in results] == [
        (stem, "none"),
        (cut[0][0], "none"),
        (cut[0][1], "sum"),
        (cut[1][0], "output"),
        (cut[1][1], "sum"),
        (head, "output"),
    ]
    full = teacher.fork()  # the teacher's outputs at the rows that are left
    replace(full, cut[1][0], lambda weight: weight[KEEP])
    replace(full, cut[1][0], lambda bias: bias[KEEP], 2)
    replace(full, cut[1][1], lambda weight: weight[:, KEEP])
    for layer, reference, target, others in (
        (cut[0][1], teacher, "add", [stem]),
        (cut[1][0], full, cut[1][0], []),
        (cut[1][1], teacher, "add_1", ["add"]),
        (head, teacher, head, []),
    ):
        weight, bias = by_hand(reference, expected, [fit, held], layer, target, others)
        replace(expected, layer, lambda old, weight=weight: weight)
        replace(expected, layer, lambda old, bias=bias: bias, 2)
    for (name, one), (_, two) in zip(student.named_tensors(), expected.named_tensors(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4), name
    assert all(result.after < result.before for result in results if result.form != "none")
    assert not results[0].before and "it gives what it should" in results[0].note


@pytest.mark.parametrize("wide", [False, True], ids=["linear", "convolutions"])
def test_a_cut_network_comes_nearer_to_the_original_and_nearer_yet_by_sums(wide):
    teacher, student, make, cut = pruned(wide)
    fit, held = pieces_of(teacher, make, (200, 201)), pieces_of(teacher, make, (100,))
    judge = Judge(teacher, pieces_of(teacher, make, (99,)))
    before = judge(student)
    rows = {first: KEEP for first, _ in cut}
    own = student.copy()
    readers = [second for _, second in cut]
    assert {result.form for result in refit_layers(teacher, own, fit, held, readers, rows)} == {"sum"}
    refit_layers(teacher, student, fit, held, rows=rows)
    assert judge(student) < judge(own) < 0.5 * before


LAYERS: list[tuple[Any, Any]] = [
    (lambda: nn.Linear(5, 6), floats(5)),
    (lambda: nn.Linear(5, 6, bias=False), floats(3, 5)),
    (lambda: nn.Conv1d(4, 6, 3, padding=1), floats(4, 9)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), floats(4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 2), dilation=2, groups=2), floats(4, 9, 9)),
    (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), floats(6, 9, 9)),
]


@pytest.mark.parametrize(("make", "inputs"), LAYERS, ids=["linear", "linear3d", "conv1d", "stride", "grouped", "depthwise"])
def test_spoiled_layers_are_found_again_from_outputs(make, inputs):
    torch.manual_seed(0)
    teacher = capture(Net(lambda net, x: net.layer(x).tanh(), layer=make()).eval(), inputs(2))
    student = teacher.copy()
    (layer,) = [goal.layer.name for goal in goals_of(teacher, student, None, {}, {})]
    replace(student, layer, lambda weight: weight + 0.3 * torch.randn_like(weight))
    (result,) = refit_layers(teacher, student, pieces_of(teacher, inputs, (60, 61)), pieces_of(teacher, inputs, (62,)))
    assert result.after < 1e-6 < 1e-2 < result.before
    assert torch.allclose(weight_of(student, layer), weight_of(teacher, layer), atol=2e-3)
    x = inputs(9)
    assert torch.allclose(student.predict(x), teacher.predict(x), atol=5e-3)


# What must not count, and what must not change -----------------------------------------------------------------------------------------


def test_nothing_is_written_where_nothing_was_lost():
    teacher = specimen("bert")[1]
    student = teacher.copy()
    pieces = pieces_of(teacher, masked_tokens, (2, 3))
    results = refit_layers(teacher, student, pieces, pieces_of(teacher, masked_tokens, (4,)))
    assert len(results) > 10 and {result.form for result in results} == {"none"}
    assert student.fingerprint() == teacher.fingerprint()


def padded(pad: int, size: int) -> dict[str, Tensor]:
    inputs = masked_tokens(size)
    mask = inputs["attention_mask"]
    mask[:, 5:] = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(size))
    mask[:, 3:] *= (torch.arange(size)[:, None] % 3 > 0).long()
    return {"input_ids": torch.where(mask > 0, inputs["input_ids"], pad), "attention_mask": mask}


def test_padding_does_not_count():
    teacher = specimen("bert")[1]
    spoiled = teacher.copy()
    layer = "linear_2"
    replace(spoiled, layer, lambda weight: weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    made = []
    for pad in (0, 7):
        student = spoiled.copy()
        fit, held = ([teacher.flat(padded(pad, size)) for size in sizes] for sizes in ((9, 12), (8,)))
        (result,) = refit_layers(teacher, student, fit, held, [layer])
        assert result.after < result.before
        made.append(weight_of(student, layer))
        one = node(teacher, layer)
        # As moments the padded positions would make a difference.
        everywhere = Moments.zero(1, *weight_of(teacher, layer).shape)
        for seen in recorded(student, fit, layer):
            everywhere.add(input_rows(one, seen[layer][0], 1, 0), output_rows(one, seen[layer][1], 1, 0))
        made.append(everywhere.gram)
    assert torch.allclose(made[0], made[2], atol=1e-6) and not torch.allclose(made[1], made[3], rtol=1e-2)


def test_zeros_of_a_sparse_weight_stay():
    teacher, student, make, cut = pruned(False)
    (_, second), _ = cut
    replace(student, second, lambda weight: weight * (torch.arange(weight.numel()).reshape(weight.shape) % 2))
    name = str(node(student, second).args[1].target)  # type: ignore[union-attr]
    student.keep_zeros(name)
    mask, before = student.masks()[name], weight_of(student, second)
    fit, held = pieces_of(teacher, make, (60,)), pieces_of(teacher, make, (61,))
    (result,) = refit_layers(teacher, student, fit, held, [second])
    after = weight_of(student, second)
    assert result.after < result.before and not after[~mask].any() and not torch.equal(after, before)
    student.check()


def test_values_that_are_not_finite_and_layers_that_are_too_wide_are_left(monkeypatch):
    teacher, student, make, cut = pruned(False)
    fit, held = pieces_of(teacher, make, (40,)), pieces_of(teacher, make, (41,))
    before = student.fingerprint()
    monkeypatch.setattr(refitting, "GRAM_ELEMENTS", 12)
    (result,) = refit_layers(teacher, student, fit, held, [cut[0][1]])
    assert result == Refitted(cut[0][1], 0.0, 0.0, "none", "it is too wide: 1 x 6 columns")
    monkeypatch.undo()
    (result,) = refit_layers(teacher, student, [[leaves[0] * float("nan")] for leaves in fit], held, [cut[0][1]])
    assert result.form == "none" and "NaN or infinite values" in result.note
    assert student.fingerprint() == before


# Removed layers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_the_layer_before_a_removed_span_learns_what_the_span_did(normed):
    teacher = capture(Blocks(False, 3, normed).eval(), floats(3)(2))
    student = teacher.copy()
    exits = [one for one in student.graph.nodes if str(one.target) in ("aten.layer_norm.default" if normed else "aten.add.Tensor",)]
    # The second block goes.
    exits[1].replace_all_uses_with(exits[0])
    student.recompile()
    fit, held = pieces_of(teacher, floats(3), (300, 301)), pieces_of(teacher, floats(3), (200,))
    pairs = ((student, exits[0].name), (teacher, exits[1].name))
    judge = Judge(teacher, pieces_of(teacher, floats(3), (100,)))
    plain = student.copy()
    told: list[str] = []
    layers = ["linear_2"]
    (result,) = refit_layers(teacher, student, fit, held, layers, spans={exits[0].name: exits[1].name}, progress=told.append)
    assert result.form == "span" and result.after < result.before and told == layers
    assert judge(student) < 0.8 * judge(plain)
    (result,) = refit_layers(teacher, plain, fit, held, layers)
    assert result.note == "it gives what it should"
    if normed:
        for position in (2, 3):
            mine, theirs = (constant(network, node(network, name).args[position]) for network, name in pairs)
            assert mine is not None and theirs is not None and torch.equal(mine, theirs)


def test_a_batch_norm_before_the_sum_hides_it_until_it_is_folded():
    model = Net(lambda net, x: x + net.norm(net.layer(x.tanh())), layer=conv(3, 3), norm=nn.BatchNorm2d(3))
    network = capture(model.eval(), images()(2))
    assert [goal.form for goal in goals_of(network, network.fork(), None, {}, {})] == ["output"]
    fold_batch_norm(network)
    assert [goal.form for goal in goals_of(network, network.fork(), None, {}, {})] == ["sum"]
