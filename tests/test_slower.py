"""Which layers stay in float because their integer kernels are slower: from profiles whose numbers are given, and from real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits_task
import onnx
import pytest
import torch
from small_nets import Net, conv, task_of
from torch import nn

import downsize as ds
from downsize import planner
from downsize.candidates import halves_for, recipes_for
from downsize.inspection import FileGraph
from downsize.measure import per_operator
from downsize.network.capture import capture
from downsize.runtimes import RUNTIMES, OperatorTime
from downsize.slower import GAIN, SLOWER, Slow, by_module, choose, integer_weights, slower_layers
from downsize.target import Target

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = ("stem.weight", "stem.bias", "body.weight", "body.bias", "end.weight", "end.bias")


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.end(net.relu(net.body(net.relu(net.stem(x)))).flatten(1)),
        stem=conv(3, 8),
        body=conv(8, 8),
        relu=nn.ReLU(),
        end=nn.Linear(512, 4),
    ).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("slower")
    original = capture(network(), (EXAMPLE,))
    quantized = ds.quantize(smooth=False, equalize=False)(original, task_of(network(), (EXAMPLE,)))
    for name, made in (("float.onnx", original), ("int8.onnx", quantized)):
        RUNTIMES["onnxruntime"].export(made, folder / name)
    return folder / "float.onnx", folder / "int8.onnx"


def ran(graph: FileGraph, **seconds: float) -> list[OperatorTime]:
    """As if the heavy node of each of these modules had taken so long, and nothing else any time."""
    heavy = {node.module: node for node in graph.nodes if node.operator in ("Conv", "Gemm", "MatMul")}
    return [OperatorTime(heavy[module].name, heavy[module].operator, time, "") for module, time in seconds.items()]


def chosen(files: tuple[Path, Path], integer: dict[str, float], real: dict[str, float]) -> list[Slow]:
    before, graph = (FileGraph(path) for path in files)
    return choose(graph, ran(graph, **integer), before, ran(before, **real), NAMES)


def test_the_layers_that_are_slower_in_integers_are_named_with_their_times(files: tuple[Path, Path]) -> None:
    slow = chosen(files, {"stem": 3.0, "body": 1.0, "end": 2.0}, {"stem": 2.0, "body": 4.0, "end": 0.5})
    assert slow == [Slow("end", ("end.weight",), 2.0, 0.5), Slow("stem", ("stem.weight",), 3.0, 2.0)]
    assert str(slow[0]) == "end 2 s in integers and 500 ms in float"


def test_no_layer_is_named_for_a_small_gain_or_where_all_are_slower(files: tuple[Path, Path]) -> None:
    real = {"stem": 1.0, "body": 1.0, "end": 1.0}
    assert chosen(files, {"stem": 0.5, "body": 0.5, "end": 0.99 * SLOWER}, real) == []
    assert chosen(files, {"stem": 2.0, "body": 2.0, "end": 2.0}, real) == []
    total = 100.0  # of which the layer would win less than GAIN
    assert chosen(files, {"stem": total, "body": 1.0, "end": 2.0}, {"stem": 200.0, "body": 2.0, "end": 2.0 - 0.9 * GAIN * total / 1.5}) == []


def test_what_quantizes_a_tensor_counts_for_the_layer_that_reads_it(files: tuple[Path, Path]) -> None:
    """The input's quantizer bears no module's name; the end's stands behind the flattened output of another."""
    graph = FileGraph(files[1])
    first = next(node for node in graph.nodes if node.operator == "QuantizeLinear")
    assert by_module(graph, [OperatorTime(first.name, "QuantizeLinear", 0.25, "")]) == {"stem": 0.25}
    assert integer_weights(graph, NAMES) == {"stem": ["stem.weight"], "body": ["body.weight"], "end": ["end.weight"]}
    assert integer_weights(FileGraph(files[0]), NAMES) == {}


def test_all_the_time_of_a_real_profile_is_counted_once(files: tuple[Path, Path]) -> None:
    profile = per_operator(files[1], (EXAMPLE,), runs=5)
    found = by_module(FileGraph(files[1]), profile)
    assert sum(found.values()) == pytest.approx(sum(item.seconds for item in profile))
    assert found["body"] > 0 and found["end"] > 0
    assert all(one.integer > SLOWER * one.float > 0 for one in slower_layers(*files, NAMES, (EXAMPLE,), "onnxruntime", 1))


def test_recipes_know_processors_that_add_in_16_bits_and_runtimes_that_compute_in_them() -> None:
    original = capture(nn.Sequential(nn.Linear(512, 512)).eval(), (torch.randn(2, 512),))
    blocks = "quantize(activations='dynamic', rounding='nearest', group=128)"
    for features, fast in ((("avx2", "fma"), False), (("avx2", "avx512_vnni"), True), (("asimd", "i8mm"), True)):
        assert (blocks in recipes_for("onnxruntime", original, features)) == fast
        assert recipes_for("onnxruntime", original, features)[0] == "quantize()"
    assert halves_for(()) == ["halve()"]
    for text in [*recipes_for("onnxruntime", original, ("avx2",)), *halves_for(("bf16",))]:
        assert str(ds.Recipe.parse(text)) == text


@pytest.mark.slow
def test_the_planner_tries_slow_layers_in_float_and_16_bits_where_8_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layers are slow is given here; what follows from it is built, measured and reported. No file is small enough for this target."""
    monkeypatch.setattr(planner, "TRIAL_SECONDS", 0.2)
    monkeypatch.setattr(planner, "FINAL_SECONDS", 0.2)
    first = next(name for name, module in digits_task.mlp().named_modules() if isinstance(module, nn.Linear))
    slow = Slow(first, (f"{first}.weight",), 2e-3, 1e-3)
    asked: list[Any] = []
    monkeypatch.setattr(planner, "slower_layers", lambda *where: asked.append(where) or [slow])
    result = ds.fit(digits_task.task(), Target(size="1 kB"), tmp_path / "run")
    rows = {row.name: row for row in result.report.attempts}
    kept = rows[f"quantize(keep=['{first}.weight'])"]
    assert "kept in float: " + str(slow) in kept.reason and kept.artifact is not None
    stored = {item.name: item.data_type for item in onnx.load(str(kept.artifact.path)).graph.initializer}
    assert any(name.startswith(f"{first}.weight") and kind == onnx.TensorProto.FLOAT for name, kind in stored.items())
    half = rows["halve()"]
    assert half.artifact is not None and half.artifact.bytes < 0.6 * result.report.baseline.artifact.bytes  # type: ignore[union-attr]
    assert Path(asked[0][1]) == rows["quantize()"].artifact.path  # type: ignore[union-attr]
