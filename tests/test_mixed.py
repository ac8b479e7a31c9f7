"""Mixed precision: what each width costs, which are taken, limits that hold to the byte, and weights that stay in float."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_nets import FOLDER, Net, conv, like, plain, task_of, weight
from torch import nn
from zoo import block, shake

import downsize as ds
from downsize.errors import AllocationError, SpecError, TargetError
from downsize.network.judge import Judge
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.statistics import Pieces, walk
from downsize.numerics.allocation import Choice, Limit, Term, allocate
from downsize.quantization import mixed
from downsize.quantization.bits import Bits
from downsize.quantization.building import Build
from downsize.quantization.exchange import Budget, exchanged
from downsize.quantization.floating import Shells
from downsize.quantization.formats import Format
from downsize.quantization.insertion import FAKE, grid_of
from downsize.quantization.mixed import Amount, amount_of, bytes_at_8_bits, choose_bits, size_limit, stored_bytes
from downsize.quantization.placement import place
from downsize.quantization.sensitivities import changed, matrix_shape, nearest_changes
from downsize.quantization.solving import solved_changes
from downsize.quantization.weight_only import Data
from downsize.techniques.quantize import Quantize
from downsize.testing import simulation_equals_artifact

IMAGE = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def wide() -> nn.Module:
    """Weights large enough that packing them makes a file smaller."""
    torch.manual_seed(0)
    layers = [block(3, 24), block(24, 32), nn.MaxPool2d(2), block(32, 32), nn.Flatten(), nn.Linear(32 * 36, 16), nn.ReLU(), nn.Linear(16, 10)]
    model = nn.Sequential(*layers)
    shake(model)
    return model.eval()


def made_of(model: nn.Module, **fields: Any) -> Network:
    return Quantize(samples=24, **fields)(ds.capture(model.eval(), IMAGE), task_of(model, IMAGE, 6))


def grids_of(network: Network) -> dict[str, int]:
    """The bits of each quantized weight as the graph has them."""
    nodes = [node for node in network.graph.nodes if node.target is FAKE and node.args[0].op == "get_attr"]
    return {str(node.args[0].target): (grid_of(node).high - grid_of(node).low).bit_length() for node in nodes}


# Neutral, and limits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["static", "none"])
def test_one_width_of_eight_is_plain_int8(activations: str) -> None:
    model = wide()
    one, two = made_of(model, activations=activations), made_of(model, activations=activations, widths=(8,))
    for each in (one, two):
        each.origin.clear()
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize("activations", ["static", "none"])
def test_size_holds_to_the_byte_and_in_the_file(activations: str) -> None:
    # Oracle: Format.bytes of what the graph says, and the packed initializers of the file.
    made = made_of(wide(), activations=activations, widths=(2, 4, 5, 8), size="62%")
    bits = grids_of(made)
    assert bits == made.origin["bits"] and len(set(bits.values())) > 1
    shapes = {name: made.tensor(name).flatten(1).shape for name in bits}
    allowed = 0.62 * sum(Format(8).bytes(*shape) for shape in shapes.values())
    assert 0.9 * allowed < sum(Format(bits[name]).bytes(*shape) for name, shape in shapes.items()) <= allowed
    path = FOLDER / f"mixed-{activations}.onnx"
    write(made, path)
    initializers = {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}
    codes = {name: array.nbytes for name, array in initializers.items() if name.endswith(("weight_packed", "weight_codes"))}
    rows = sum(shape[0] for shape in shapes.values())
    assert len(codes) == len(bits) and sum(codes.values()) + 2 * rows <= allowed + 8 * len(bits)  # a row of codes is filled up to whole bytes


def test_a_limit_in_bytes_and_one_that_cannot_be_reached() -> None:
    model = wide()
    made = made_of(model, activations="none", rounding="nearest", widths=(4, 8), size="40 kB")
    assert sum(Format(bits).bytes(*made.tensor(name).flatten(1).shape) for name, bits in grids_of(made).items()) <= 40_000
    with pytest.raises(AllocationError, match=r"size of at most .* cannot be reached: .* take ([\d.]+) kB, (0\.5\d+) of") as error:
        made_of(model, widths=(4, 8), size=0.3)
    least = float(str(error.value).split(" of what they take")[0].split(", ")[-1])
    assert made_of(model, widths=(4, 8), size=least + 1e-3).origin["bits"]


def test_weights_too_small_to_be_packed_are_told() -> None:
    # 24 x 24 codes of 4 bits save 288 bytes, what decodes them takes 600.
    layers = [nn.Flatten(), nn.Linear(3 * 144, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)]
    with pytest.raises(AllocationError, match=r"\(2 of 3 weights are too small: scales and what decodes them take more than is saved\)"):
        made_of(nn.Sequential(*layers), widths=(4, 8), size=0.1)


def test_bit_operations_are_those_of_the_layers() -> None:
    # Oracle: the formula. Output positions x weights x bits of the weight x 8.
    model = Net(lambda net, x: net.b(torch.relu(net.a(x))).mean((2, 3)), a=conv(3, 8), b=conv(8, 16))
    made = made_of(model, widths=(2, 4, 8), bops=0.5, profile="x86")
    macs = {"a.weight": 144 * 8 * 27, "b.weight": 144 * 16 * 72}
    bits = grids_of(made)
    assert sum(macs[name] * bits[name] for name in macs) <= 0.5 * 8 * sum(macs.values())
    with pytest.raises(AllocationError, match=r"bops of .* 0\.250 of what"):
        made_of(model, widths=(2, 4, 8), bops=0.2, profile="x86")


def test_size_limit_reads_parts_and_bytes() -> None:
    assert [size_limit(each, 1000.0) for each in ("60%", 0.6, 1, 500, "3 kB", "60 %")] == [600.0, 600.0, 1000.0, 500.0, 3000.0, 600.0]
    with pytest.raises(TargetError):
        size_limit("3 XB", 1.0)
    # Codes that packing would not make smaller are bytes.
    assert stored_bytes(8, 9, Format(2)) == Format(8).bytes(8, 9) and stored_bytes(64, 576, Format(2)) == Format(2).bytes(64, 576)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0.5}, "without widths"),
        ({"widths": (4, 8)}, "without a limit"),
        ({"widths": (4, 8), "size": 0.5, "bits": 4}, "leave bits"),
        ({"widths": (4, 8), "size": 0.5, "activations": "dynamic"}, "leave bits"),
        ({"widths": (4, 8), "size": 0.5, "levels": "twn"}, "leave bits"),
        ({"widths": (4, 8), "bops": 0.5, "activations": "none"}, "products of integers"),
        ({"widths": (4, 9), "size": 0.5}, "9"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Quantize(**fields)


def test_spelled_as_text() -> None:
    recipe = ds.Recipe.parse("quantize(widths=[3, 4, 8], size=60%, keep=['head'], by='fisher')")
    assert ds.Recipe.parse(str(recipe)) == recipe and recipe.steps[0] == Quantize(widths=(3, 4, 8), size="60%", keep=("head",), by="fisher")


# What is chosen ---------------------------------------------------------------------------------------------------------------------


def data_of(network: Network, model: nn.Module) -> Data:
    pieces = Pieces.of(network, task_of(model, IMAGE, 4).batches("calibrate"))
    return Data(pieces[::2], pieces[1::2])


@pytest.mark.parametrize("by", ["loss", "fisher"])
def test_the_program_takes_the_best_of_all_assignments(by: mixed.By, monkeypatch: pytest.MonkeyPatch) -> None:
    # Oracle: all assignments of three widths to five weights, by the summed estimate.
    model = wide()
    network = plain(model, IMAGE)
    data, points, ways = data_of(network, model), place(network).weights, {bits: Format(bits) for bits in (2, 4, 8)}
    most = 0.5 * bytes_at_8_bits(network, points)
    monkeypatch.setattr(mixed, "TRIALS", 0)
    losses = mixed.measured(network, lambda kept: network, points, ways, data, by, solve=False)
    bits = choose_bits(network, points, ways, Amount(most), lambda: losses)
    changes = nearest_changes(network, points, {name: ways for name in bits})
    errors = (mixed.losses if by == "loss" else mixed.fisher)(network, data.held, changes)
    names = list(bits)
    shapes = {str(point.node.target): matrix_shape(network.tensor(str(point.node.target)), point) for point in points}

    def summed(chosen: tuple[int, ...]) -> float:
        return sum(errors[name][one] for name, one in zip(names, chosen, strict=True))

    def bytes_of(chosen: tuple[int, ...]) -> float:
        return sum(stored_bytes(*shapes[name], ways[one]) for name, one in zip(names, chosen, strict=True))

    every = [chosen for chosen in itertools.product(ways, repeat=len(names)) if bytes_of(chosen) <= most]
    assert summed(tuple(bits.values())) <= min(map(summed, every)) * 1.002
    assert bytes_of(tuple(bits.values())) <= most


def test_exchanges_find_what_the_estimate_missed() -> None:
    # Oracle: all assignments, by a true loss in which errors of neighbours multiply.
    budget = Budget("size", 11.0, [[1.0, 2.0, 4.0]] * 5)
    improved = best = best_before = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        errors = [sorted(row, reverse=True) for row in torch.rand(5, 3, generator=generator).tolist()]

        def loss(levels: Any, errors: list[list[float]] = errors) -> float:
            taken = [row[level] for row, level in zip(errors, levels, strict=True)]
            return sum(taken) + 3 * sum(a * b for a, b in itertools.pairwise(taken))

        terms = tuple(Term((i,), np.asarray(costs)) for i, costs in enumerate(budget.costs))
        start = allocate([Choice(str(i), tuple(row)) for i, row in enumerate(errors)], [Limit("size", 11.0, terms)]).levels
        levels, before, after = exchanged(start, errors, [budget], loss, trials=200)
        every = [each for each in itertools.product(range(3), repeat=5) if budget.of(each) <= 11]
        assert budget.of(levels) <= 11 and after == loss(levels) <= before == loss(start)
        improved += after < before
        best += after == min(map(loss, every))
        best_before += before == min(map(loss, every))
    assert improved >= 3 and best > best_before
    tried = []
    exchanged((0,) * 5, [[3.0, 2.0, 1.0]] * 5, [budget], lambda each: tried.append(each) or -float(sum(each)), trials=3)
    assert len(tried) == 4 and len(set(tried)) == 4


def test_the_whole_networks_loss_falls_by_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide()
    network = plain(model, IMAGE)
    data, points, ways = data_of(network, model), place(network).weights, {bits: Format(bits) for bits in (2, 3, 4, 8)}
    changes, judge = nearest_changes(network, points, {str(point.node.target): ways for point in points}), Judge(network, data.held)
    found = []
    for trials in (0, 32):
        monkeypatch.setattr(mixed, "TRIALS", trials)
        losses = mixed.measured(network, lambda kept: network, points, ways, data, solve=False)
        bits = choose_bits(network, points, ways, Amount(0.45 * bytes_at_8_bits(network, points)), lambda losses=losses: losses)
        whole = {key: value for name, one in bits.items() for key, value in changes[name][one].items()}
        other = network.fork()
        with changed(other, whole):
            found.append(judge(other))
    assert found[1] <= found[0]


def test_solved_weights_lose_less_than_nearest_ones() -> None:
    # Oracle: the layer's own output on the data it was solved on, run as a layer.
    model = wide()
    network = plain(model, IMAGE)
    pieces, ways = data_of(network, model).fit, {3: Format(3)}
    names = [str(point.node.target) for point in place(network).weights]
    solved = solved_changes(network, dict.fromkeys(names, ways), pieces)
    nearest = nearest_changes(network, place(network).weights, dict.fromkeys(names, ways))
    assert solved.keys() == set(names)
    for name in names:
        layer = next(node for node in network.graph.nodes if node.op == "get_attr" and node.target == name).users
        errors = []
        for ways_of in (nearest, solved):
            total = 0.0
            for leaves in pieces:
                wanted, got = [], []
                (reader,) = layer
                walk(network, leaves, {reader: lambda args, value, wanted=wanted: wanted.append(value)})
                other = network.fork()
                twin = next(node for node in other.graph.nodes if node.name == reader.name)
                with changed(other, ways_of[name][3]):
                    walk(other, leaves, {twin: lambda args, value, got=got: got.append(value)})
                total += float((wanted[0] - got[0]).square().sum())
            errors.append(total)
        assert errors[1] < errors[0], name


def test_an_amount_counts_weights_that_two_layers_read() -> None:
    shared = weight(6, 6)
    model = Net(lambda net, x: torch.relu(x @ net.w) @ net.w, w=shared)
    network = plain(model, torch.randn(4, 6))
    placement = place(network)
    amount = amount_of(network, placement.weights, None, 0.5, dict.fromkeys(placement.layers, 8))
    assert amount.per_bit == {"w": 2 * 4 * 36 * 8.0} and amount.operations == 0.5 * 2 * 4 * 36 * 64


# In float ---------------------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_in_float_with_its_inputs() -> None:
    model = Net(lambda net, x: net.d(net.c(torch.relu(net.b(torch.relu(net.a(x))))).flatten(1)), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4),
                d=nn.Linear(4 * 144, 5))  # fmt: skip
    made = made_of(model, keep=("b",), equalize=False)
    reference = plain(model, IMAGE)
    assert set(grids_of(made)) == {"a.weight", "c.weight", "d.weight"}
    assert torch.equal(made.tensor("b.weight"), reference.tensor("b.weight"))
    layer = next(node for node in made.graph.nodes if getattr(node.args[1] if len(node.args) > 1 else None, "target", "") == "b.weight")
    source, seen = layer.args[0], []
    while source.op == "call_function" and source.target is not layer.target:
        seen.append(source.target)
        source = source.args[0]
    assert FAKE not in seen and source.target is layer.target
    path = FOLDER / "kept.onnx"
    write(made, path)
    simulation_equals_artifact(made, path, IMAGE)
    everything = made_of(model, keep=("a", "b", "c"), equalize=False, smooth=False)
    assert set(grids_of(everything)) == {"d.weight"}


def test_kept_layers_take_no_part_in_the_choice_and_unknown_names_are_refused() -> None:
    made = made_of(wide(), widths=(3, 8), size=0.7, keep=("*.0.weight",), activations="none", rounding="nearest")
    assert set(grids_of(made)) == set(made.origin["bits"]) == {"5.weight", "7.weight"}
    with pytest.raises(SpecError, match=r"keep='7.wieght' names none of the weights; did you mean '7.weight'"):
        made_of(wide(), keep=("7.wieght",))


@pytest.mark.parametrize("activations", ["static", "none"])
def test_float_among_the_widths_costs_32_bits_and_leaves_the_inputs_alone(activations: str) -> None:
    # Oracle: bytes by hand, float weights that are the original's, and quantizers before the others alone.
    model = wide()
    made = made_of(model, activations=activations, widths=(4, 8, 32), size="150%", equalize=False, smooth=False, rounding="nearest")
    reference, bits = plain(model, IMAGE), made.origin["bits"]
    kept = {name for name, count in bits.items() if count == 32}
    assert kept and grids_of(made) == {name: count for name, count in bits.items() if count != 32}
    shapes = {name: reference.tensor(name).flatten(1).shape for name in bits}
    at_8_bits = sum(Format(8).bytes(*shape) for shape in shapes.values())
    assert sum(4 * shape.numel() if name in kept else Format(bits[name]).bytes(*shape) for name, shape in shapes.items()) <= 1.5 * at_8_bits
    for node in made.graph.nodes:
        name = str(getattr(node.args[1], "target", "")) if len(node.args) > 1 else ""
        if name in kept:
            assert torch.equal(made.tensor(name), reference.tensor(name)) and node.args[0].target is not FAKE
    everything = made_of(model, activations=activations, widths=(8, 32), size="500%", equalize=False, smooth=False)
    images = like(IMAGE, 4, 5)
    torch.testing.assert_close(everything(images), reference(images), rtol=1e-5, atol=1e-5)
    assert grids_of(everything) == {}


def test_float_counts_the_rounding_of_inputs_and_32_times_32_operations() -> None:
    # Oracle: all assignments, by losses of weight and input alone, each measured on a network that has nothing else quantized.
    torch.manual_seed(0)
    model = Net(lambda net, x: net.b(torch.relu(net.a(x))).mean((2, 3)), a=conv(3, 8), b=conv(8, 16))
    network = plain(model, IMAGE)
    placement, pieces = place(network), Pieces.of(network, task_of(model, IMAGE, 4).batches("calibrate"))
    data = Data(pieces, pieces)
    names = [str(point.node.target) for point in placement.weights]
    shells = Shells(network, placement, Build(Bits(8, 8, 8), "uniform", True), pieces)
    spared = shells.spared(names, data)
    # With b in float, the input of a is all that is rounded.
    assert Judge(network, data.held)(shells(["b.weight"])) == pytest.approx(spared["a.weight"], rel=1e-4) and spared["b.weight"] > 0
    ways = {8: Format(8), 32: None}
    found = mixed.measured(network, shells, placement.weights, ways, data, solve=False, spared=spared)
    weights = mixed.losses(network, data.held, nearest_changes(network, placement.weights, {name: {8: Format(8)} for name in names}))
    assert [row[1] for row in found.alone] == [0.0, 0.0] and found.whole((1, 1)) < 1e-12 < found.whole((0, 0))
    assert [row[0] for row in found.alone] == pytest.approx([weights[name][8] + spared[name] for name in names])
    amount = amount_of(network, placement.weights, None, 1.0, dict.fromkeys(placement.layers, 8))
    assert amount.in_float == {name: 128 * amount.per_bit[name] for name in names}


# Chains -----------------------------------------------------------------------------------------------------------------------------


STEP = Quantize(widths=(3, 4, 8), size=0.6, samples=16)


@pytest.mark.slow
def test_after_pruning() -> None:
    model = wide()
    network, task = ds.capture(model, IMAGE), task_of(model, IMAGE, 4)
    made = STEP(ds.Recipe.parse("prune(macs=0.6, multiple=1)").steps[0](network, task), task)
    assert made.tensor("1.0.weight").numel() < network.tensor("1.0.weight").numel() and len(set(grids_of(made).values())) > 1


@pytest.mark.slow
def test_zeros_survive() -> None:
    model = wide()
    network, task = ds.capture(model, IMAGE), task_of(model, IMAGE, 4)
    sparse = ds.Recipe.parse("sparsify(sparsity=0.5)").steps[0](network, task)
    made = STEP(sparse, task)
    assert sparse.sparse and made.sparse == sparse.sparse and len(set(grids_of(made).values())) > 1
    made.check()  # no zero that must stay has become another value
    for name in sparse.sparse:
        assert bool((made.tensor(name)[sparse.tensor(name) == 0] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"activations": "none", "group": 32, "refit": False}], ids=["static", "groups"])
def test_files_compute_what_was_simulated(fields: dict[str, Any]) -> None:
    made = Quantize(widths=(3, 4, 8), size=0.6, samples=16, **fields)(ds.capture(wide(), IMAGE), task_of(wide(), IMAGE, 4))
    assert len(set(made.origin["bits"].values())) > 1
    path = FOLDER / "mixed.onnx"
    write(made, path)
    simulation_equals_artifact(made, path, IMAGE)
