"""quantize(widths=[8, 32], latency=...): which layers compute in integers, by times that are given and by the runtime's own."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small_nets import Net, conv, plain, task_of
from torch import nn

import downsize as ds
from downsize.errors import AllocationError, SpecError, TargetError, TaskError
from downsize.measure import latency
from downsize.measure.shapes import LatencyTable
from downsize.network.statistics import Pieces
from downsize.quantization import limits as limits_module
from downsize.quantization.bits import Bits
from downsize.quantization.building import Build
from downsize.quantization.floating import Shells
from downsize.quantization.latency import Layers, TimeLimit, choose_types, costs_of, fastest
from downsize.quantization.limits import Written, _in_order, _modules, _parents
from downsize.quantization.mixed import Losses
from downsize.quantization.placement import place
from downsize.quantization.timing import Files, Owners, Spent, Timed, file_clock, in_turn, spent
from downsize.runtimes import RUNTIMES, OperatorTime
from downsize.techniques.quantize import Quantize

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Told:
    """A stopwatch whose times are a sum: of each layer, of each change of type between a layer and its parent, and of the rest.

    ``off``: files take this times what the profiles sum up to.
    """

    def __init__(self, layers: Layers, times: list[tuple[float, float]], change: list[float], rest: float = 0.0, off: float = 1.0) -> None:
        self.layers, self.times, self.change, self.rest, self.off = layers, times, change, rest, off
        self.asked: list[frozenset[str]] = []

    def spent(self, kept: Collection[str]) -> dict[str, Spent]:
        found = {"": Spent(self.rest, 0.0)}
        for number, (name, parent) in enumerate(zip(self.layers.names, self.layers.parents, strict=True)):
            differs = parent is not None and (name in kept) != (self.layers.names[parent] in kept)
            found[name] = Spent(self.times[number][name in kept], self.change[number] * differs)
        return found

    def total(self, kept: Collection[str]) -> float:
        return sum(one.all for one in self.spent(kept).values())

    def timed(self, kept: Collection[str]) -> Timed:
        self.asked.append(frozenset(kept))
        names = frozenset(self.layers.names)
        off = 1.0 if frozenset(kept) == names else self.off
        return Timed(off * self.total(kept), off * self.total(kept) / self.total(names))


def case(seed: int, count: int = 7, off: float = 1.0) -> tuple[Told, list[tuple[float, float]]]:
    """Random times and losses (in 8 bits, in float) of a small tree of layers; a few are slower in integers."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: float(torch.rand((), generator=generator))  # noqa: E731
    parents = [None, *(int(draw() * number) for number in range(1, count))]
    layers = Layers([f"w{i}" for i in range(count)], parents, [True] * count)
    times = [(draw() * (2.0 if draw() < 0.2 else 0.7), 1.0) for _ in range(count)]
    return Told(layers, times, [0.3 * draw() for _ in range(count)], rest=0.5, off=off), [(draw(), 0.0) for _ in range(count)]


def losses_of(watch: Told, errors: list[tuple[float, float]]) -> Losses:
    return Losses(watch.layers.names, (8, 32), errors, lambda levels: sum(row[level] for row, level in zip(errors, levels, strict=True)))


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all_assignments(seed: int) -> None:
    # Oracle: all 2^7 assignments.
    watch, errors = case(seed)
    losses, layers = losses_of(watch, errors), watch.layers
    every = list(itertools.product((0, 1), repeat=7))
    shares = sorted(watch.timed(layers.kept(levels)).ratio for levels in every)
    limit = TimeLimit(share=max(shares[0] * 1.02, min(0.7, shares[-1] * 0.9)))
    chosen = choose_types(layers, limit, watch, lambda: losses)
    levels = tuple(chosen[name] for name in layers.names)
    assert watch.timed(layers.kept(levels)).ratio <= limit.share
    # The program aims a little below the limit.
    allowed = [each for each in every if watch.timed(layers.kept(each)).ratio <= 0.985 * limit.share]
    least = min((losses.whole(each) for each in allowed), default=float("inf"))
    assert losses.whole(levels) <= least * 1.02


def test_costs_are_what_the_files_take() -> None:
    # Oracle: the sum that the stopwatch goes by, and the fastest of all assignments, in trees with several readers of one layer.
    for seed in range(6):
        watch, _ = case(seed)
        budget = costs_of(watch.layers, watch)
        every = list(itertools.product((0, 1), repeat=7))
        for levels in every:
            assert budget.of(levels) == pytest.approx(watch.total(watch.layers.kept(levels)))
        assert budget.of(fastest(budget, watch.layers)) == pytest.approx(min(map(budget.of, every)))
        for levels, number in itertools.product(every[::9], range(7)):
            other = (*levels[:number], 1 - levels[number], *levels[number + 1 :])
            assert budget.change(levels, number, 1 - levels[number]) == pytest.approx(budget.of(other) - budget.of(levels))


class Sharing(Told):
    """A layer whose kernel takes longer in proportion to how many of its readers are of another type."""

    def spent(self, kept: Collection[str]) -> dict[str, Spent]:
        found = {name: Spent(one.own, 0.0) for name, one in super().spent(kept).items()}
        for own, parent in zip(self.layers.names, self.layers.parents, strict=True):
            read = "" if parent is None else self.layers.names[parent]
            if read and (own in kept) != (read in kept):
                readers = sum(other == parent for other in self.layers.parents)
                found[read] = found[read]._replace(own=found[read].own + 0.6 / readers)
        return found


def test_readers_share_what_a_layer_takes_longer_because_of_them() -> None:
    # Oracle: the sum that the stopwatch goes by; counted for each reader alone, the whole would be counted several times.
    told, _ = case(0)
    layers = Layers(["a", "b", "c", "d"], [None, 0, 0, 0], [True] * 4)
    watch = Sharing(layers, told.times[:4], told.change[:4], told.rest)
    budget = costs_of(layers, watch)
    for levels in itertools.product((0, 1), repeat=4):
        assert budget.of(levels) == pytest.approx(watch.total(layers.kept(levels)))


@pytest.mark.parametrize("off", [0.8, 1.2])
def test_files_that_take_another_time_than_predicted_still_meet_the_limit(off: float) -> None:
    # Oracle: the times of the files themselves, over all assignments; loosened where they are faster than predicted, else tightened.
    for seed in range(4):
        watch, errors = case(seed, off=off)
        losses, layers = losses_of(watch, errors), watch.layers
        every = list(itertools.product((0, 1), repeat=7))
        ratios = {levels: watch.timed(layers.kept(levels)).ratio for levels in every}
        share = min(ratios.values()) + 0.4 * (1 - min(ratios.values()))
        chosen = choose_types(layers, TimeLimit(share=share), watch, lambda losses=losses: losses)
        levels = tuple(chosen[name] for name in layers.names)
        allowed = {each: losses.whole(each) for each, ratio in ratios.items() if ratio <= share}
        better = [loss for loss in allowed.values() if loss < losses.whole(levels)]
        assert levels in allowed and len(better) <= len(allowed) // 8


def test_layers_that_are_slower_in_integers_stay_float() -> None:
    layers = Layers(["a", "b", "c"], [None, 0, 1], [True] * 3)
    watch = Told(layers, [(0.3, 1.0), (3.0, 1.0), (0.3, 1.0)], [0.0, 0.1, 0.1])
    losses = losses_of(watch, [(1.0, 0.0), (0.001, 0.0), (1.0, 0.0)])
    assert choose_types(layers, TimeLimit(share=0.65), watch, lambda: losses) == {"a": 0, "b": 1, "c": 0}


def test_a_weight_that_cannot_stay_in_float_does_not() -> None:
    layers = Layers(["a", "b"], [None, 0], [True, False])
    watch = Told(layers, [(0.5, 1.0), (0.5, 1.0)], [0.0, 0.01])
    losses = losses_of(watch, [(1.0, 0.0), (9.0, float("inf"))])
    assert choose_types(layers, TimeLimit(share=0.8), watch, lambda: losses) == {"a": 1, "b": 0}


def test_a_limit_below_the_fastest_is_refused_before_losses_are_measured() -> None:
    watch, _ = case(3)
    layers, asked = watch.layers, []
    least = min(watch.timed(layers.kept(levels)).ratio for levels in itertools.product((0, 1), repeat=7))
    with pytest.raises(AllocationError, match=rf"cannot be reached: the fastest of \d files takes .*, {least:.3f} of the float file's time"):
        choose_types(layers, TimeLimit(share=0.9 * least), watch, lambda: asked.append(1) or pytest.fail("losses were measured"))
    assert asked == []


def test_float_that_meets_the_limit_is_taken_and_8_bits_alone_are_only_timed() -> None:
    watch, _ = case(1)
    layers = watch.layers
    assert set(choose_types(layers, TimeLimit(seconds=100.0), watch, lambda: pytest.fail("nothing to choose")).values()) == {1}
    watch.asked.clear()
    assert set(choose_types(layers, TimeLimit(seconds=100.0), watch, None).values()) == {0} and watch.asked == [frozenset()]
    with pytest.raises(AllocationError, match="fastest of 1 files"):
        choose_types(layers, TimeLimit(share=0.01), watch, None)


# What is said of it -----------------------------------------------------------------------------------------------------------------


def test_limits_are_parts_or_times() -> None:
    timed = Timed(0.004, 0.5)
    assert [TimeLimit.of(each).used(timed) for each in (0.5, "50%", "50 %", "4 ms", "8ms", "100%")] == pytest.approx([1, 1, 1, 1, 0.5, 0.5])
    with pytest.raises(SpecError, match="latency=3 came; expected a part"):
        TimeLimit.of(3)
    for wrong in ("3", "3 MB", "-1 ms"):
        with pytest.raises(TargetError):
            TimeLimit.of(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latency": 0.6}, "latency came without widths"),
        ({"latency": 0.6, "widths": (4, 8, 32)}, r"widths=\[4, 8, 32\] came with latency"),
        ({"latency": 0.6, "widths": (8, 32), "size": 0.5}, "size and latency came"),
        ({"latency": 0.6, "widths": (8, 32), "activations": "none"}, "integer kernels"),
        ({"latency": 0.6, "widths": (8, 32), "activations": "dynamic"}, "leave bits"),
        ({"latency": 0, "widths": (8, 32)}, "latency=0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Quantize(**fields)


@pytest.mark.parametrize("latency", [0.6, "60%", "3 ms"])
def test_spelled_as_text_and_yaml(latency: str | float) -> None:
    recipe = ds.Recipe((Quantize(widths=(8, 32), latency=latency),))
    assert ds.Recipe.parse(str(recipe)) == recipe == ds.Recipe.from_yaml(recipe.to_yaml())


def small() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.end((net.two(torch.relu(net.one(y := torch.relu(net.stem(x))))) + y).mean((2, 3))),
        stem=conv(3, 8), one=conv(8, 8), two=conv(8, 8), end=nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_without_a_clock_that_times_files_nothing_is_begun() -> None:
    step, task = Quantize(widths=(8, 32), latency=0.6), task_of(small(), IMAGE, 2)
    network = ds.capture(small(), IMAGE)
    with pytest.raises(TaskError, match="latency= needs latencies measured in a runtime"):
        step(network, task)
    with pytest.raises(TaskError, match="clock is a object, which cannot time files"):
        step(network, ds.Task(task.model, task.example, task.data, clock=object()))


# Files ------------------------------------------------------------------------------------------------------------------------------


def test_the_graph_tells_which_layer_is_computed_before_which() -> None:
    network = plain(small(), IMAGE)
    placement = place(network)
    points = _in_order(network, placement.weights)
    assert [str(point.node.target) for point in points] == ["stem.weight", "one.weight", "two.weight", "end.weight"]
    assert _parents(network, placement, points) == [None, 0, 1, 2]
    assert _modules(points) == {f"{name}.weight": name for name in ("stem", "one", "two", "end")}


def test_what_ran_before_a_product_counts_for_it() -> None:
    ran = [OperatorTime(name, operator, seconds, "") for name, operator, seconds in (
        ("q", "QuantizeLinear", 1.0), ("a", "QLinearConv", 2.0), ("d", "DequantizeLinear", 4.0), ("m", "MatMul", 8.0), ("r", "ReorderInput", 16.0),
        ("b", "Conv", 32.0), ("a", "QLinearConv", 64.0), ("end", "Softmax", 128.0))]  # fmt: skip
    owners = {"a": "a.weight", "b": "b.weight", "m": ""}
    assert spent(ran, lambda item: owners.get(item.node)) == {
        "a.weight": Spent(66.0, 1.0), "b.weight": Spent(32.0, 20.0), "": Spent(8.0, 128.0)
    }  # fmt: skip


@pytest.mark.parametrize(
    "runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.skipif(RUNTIMES["openvino"].missing() is not None, reason="no openvino"))]
)
def test_every_weight_of_a_real_profile_has_its_product(runtime: str, tmp_path: Path) -> None:
    """Oracle: the profile's sum; and the rows themselves, in which each layer's product is told by its module or by its output."""
    network = plain(small(), IMAGE)
    points = _in_order(network, place(network).weights)
    clock = LatencyTable(runtime, folder=tmp_path)
    files = Files(file_clock(clock), network, IMAGE, _modules(points), tmp_path)
    quantized = Quantize(samples=8, holdout=2, equalize=False)(ds.capture(small(), IMAGE), task_of(small(), IMAGE, 2))
    for path in (files.baseline, files.write(quantized)):
        ran = clock.runtime.profile(path, 1, IMAGE, 3)
        owner = Owners(path, files.modules)
        named = [owner(item) for item in ran]
        assert [name for name in named if name] == ["stem.weight", "one.weight", "two.weight", "end.weight"], [item.node for item in ran]
        found = spent(ran, owner)
        assert sum(one.all for one in found.values()) == pytest.approx(sum(item.seconds for item in ran))
    timed = files.timed(files.baseline)
    assert timed.seconds > 0 and 0.2 < timed.ratio < 5


def test_files_are_written_once_with_the_layers_that_stay_float(tmp_path: Path) -> None:
    # Oracle: the types of the weights in the files.
    network, names = plain(small(), IMAGE), [f"{name}.weight" for name in ("stem", "one", "two", "end")]
    placement = place(network)
    files = Files(file_clock(LatencyTable(folder=tmp_path)), network, IMAGE, _modules(placement.weights), tmp_path)
    pieces = Pieces.of(network, task_of(small(), IMAGE, 2).batches("calibrate"))
    watch = Written(files, Shells(network, placement, Build(Bits(8, 8, 8), "uniform", True), pieces), names)
    assert watch.timed(names).ratio == 1.0 and watch.timed({"end.weight"}).ratio > 0
    assert watch.spent({"end.weight"}).keys() == {"", *names}
    written = sorted(tmp_path.glob("*.onnx"))
    assert len(written) == 2  # the float file and one other
    kinds = {item.name: item.data_type for item in onnx.load(str(written[1])).graph.initializer}
    assert kinds["end.weight"] == onnx.TensorProto.FLOAT
    assert all(kinds[f"{name}_codes"] == onnx.TensorProto.INT8 for name in names[:3])


def test_two_calls_take_turns() -> None:
    # Oracle: one call does twice the other's work.
    square = torch.randn(160, 160)
    one, two = (lambda: square @ square), (lambda: (square @ square, square @ square))
    assert 1.3 < in_turn(two, one).ratio < 3 and 0.3 < in_turn(one, two).ratio < 0.77


@pytest.mark.slow
def test_neutral_settings_and_the_layers_that_stay_float(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times are given here; the files they are said of are real."""
    network, data = ds.capture(small(), IMAGE), task_of(small(), IMAGE, 4).data
    task = ds.Task(small(), IMAGE, data, clock=LatencyTable(folder=tmp_path))

    def made(share: float, **fields: Any) -> Any:
        watch = lambda files, shells, names: Told(  # noqa: E731
            Layers(names, [None, 0, 1, 2], [True] * 4), [(0.5, 1.0)] * 3 + [(2.0, 1.0)], [0.01] * 4
        )
        monkeypatch.setattr(limits_module, "Written", watch)
        found = Quantize(samples=16, latency=share, equalize=False, **fields)(network, task)
        found.origin.clear()
        return found

    one = Quantize(samples=16, equalize=False)(network, task)
    one.origin.clear()
    assert made(0.99, widths=(8,)).fingerprint() == one.fingerprint()
    assert made(1.0, widths=(8, 32)).fingerprint() == network.fingerprint()
    kept = made(0.7, widths=(8, 32))
    weights = {str(node.args[0].target) for node in kept.graph.nodes if "fake_quantize" in str(node.target) and node.args[0].op == "get_attr"}
    assert "end.weight" not in weights and weights
    assert torch.equal(kept.tensor("end.weight"), network.tensor("end.weight"))


@pytest.mark.slow
def test_a_file_meets_the_limit_in_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: measured in a process of its own beside the float file; where even the fastest file is too slow the error says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    layers = [conv(3, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    image = torch.randn(1, 3, 24, 24)
    task, share = task_of(model, image, batches=4), 0.8
    try:
        result = ds.run(task, f"quantize(widths=[8, 32], latency={share}, samples=12)", ds.Target(), into=tmp_path / "run")
    except AllocationError as error:
        assert f"latency of at most {share}" in str(error)
        return
    baseline = tmp_path / "run" / "baseline.onnx"
    assert latency(result.artifact.path, image, baseline=baseline)["latency_ratio"].low <= share * 1.1  # type: ignore[operator]
