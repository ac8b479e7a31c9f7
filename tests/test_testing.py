"""The laws in downsize.testing: each holds where it should, and fails when what it guards is broken on purpose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_nets import Made, Net, conv, int8, like, task_of, weight
from torch import nn

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import aten, set_constant
from downsize.task import Task
from downsize.techniques.quantize import Quantize
from downsize.testing import (
    artifact_is_as_near,
    captured_equals_original,
    check_technique,
    loaded_equals_live,
    neutral_equals_identity,
    simulation_equals_artifact,
)

IMAGE, ROWS = (torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in ((2, 3, 8, 8), (2, 8)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def nudged(network: Network, name: str, by: float) -> Network:
    """A copy with one weight changed."""
    made = network.copy()
    node = next(node for node in made.graph.nodes if node.op == "get_attr" and node.target == name)
    tensor = made.tensor(name).detach().clone()
    tensor.reshape(-1)[0] += by
    set_constant(made, node, tensor)
    return made


# Captured, loaded, neutral --------------------------------------------------------------------------------------------------------


def test_captured_equals_original():
    model = perceptron()
    network = capture(model, ROWS)
    assert captured_equals_original(model, network, ROWS) <= 1e-5
    with pytest.raises(AssertionError, match=r"captured == original: they differ by \d+\.\d+ of the largest value; allowed 1e-05"):
        captured_equals_original(model, nudged(network, "0.weight", 5.0), ROWS)
    with pytest.raises(AssertionError, match=r"structure .*tuple.*; expected .*tensor"):
        captured_equals_original(Net(lambda net, x: net.p(x), p=model), capture(Net(lambda net, x: (net.p(x),), p=model).eval(), ROWS), ROWS)


def test_captured_equals_original_at_other_batches():
    model = Net(lambda net, x: net.l(x) * (1 + (x.shape[0] == 3)), l=nn.Linear(8, 4)).eval()
    network = capture(Net(lambda net, x: net.l(x), l=model.l).eval(), ROWS)
    with pytest.raises(AssertionError, match="captured == original: they differ by"):
        captured_equals_original(model, network, ROWS)


def test_loaded_equals_live(monkeypatch):
    network = capture(perceptron(), ROWS)
    assert loaded_equals_live(network, ROWS).fingerprint() == network.fingerprint()
    broken = nudged(network, "2.bias", 1e-7)
    monkeypatch.setattr(Network, "load", staticmethod(lambda path: broken))
    with pytest.raises(AssertionError, match="loaded == live: the fingerprint of the loaded network differs"):
        loaded_equals_live(network, ROWS)
    monkeypatch.setattr(Network, "fingerprint", lambda self: "the same")
    with pytest.raises(AssertionError, match=r"loaded == live: 2 of 8 entries of output 0 differ"):
        loaded_equals_live(network, ROWS)


def test_loaded_equals_live_takes_nan_for_equal_to_nan():
    network = capture(Net(lambda net, x: torch.where(x > 0, x, float("nan"))).eval(), ROWS)
    loaded_equals_live(network, ROWS)


def test_neutral_equals_identity():
    network = capture(perceptron(), ROWS)
    assert neutral_equals_identity(network, network.copy(), ROWS) == 0.0
    with pytest.raises(AssertionError, match=r"neutral == identity: they differ by .* allowed 1e-06"):
        neutral_equals_identity(network, nudged(network, "0.weight", 1e-3), ROWS)


# Simulation and artifact ----------------------------------------------------------------------------------------------------------


def broken_file(made: Made, folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """The file with some of its constants changed by ``edit``."""
    model = onnx.load(made.path)
    values = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    edit(values)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    onnx.save(model, folder / "broken.onnx")
    return folder / "broken.onnx"


@pytest.fixture(scope="module")
def convolutional() -> Made:
    torch.manual_seed(0)
    return int8(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4), nn.Flatten(), nn.Linear(256, 4)), IMAGE)


def test_simulation_equals_artifact(convolutional):
    found = simulation_equals_artifact(convolutional.quantized, convolutional.path, convolutional.inputs)
    assert found.requantizations == 4 and 0 <= found.off < 0.005
    assert found.agreement.samples == 8 and found.agreement.relative_error < 0.02


def test_a_float_network_is_compared_by_its_outputs(tmp_path):
    network = capture(perceptron(), ROWS)
    write(network, tmp_path / "m.onnx")
    assert simulation_equals_artifact(network, tmp_path / "m.onnx", ROWS).requantizations == 0
    with pytest.raises(AssertionError, match="from the same codes outputs differ by"):
        simulation_equals_artifact(nudged(network, "0.weight", 1.0), tmp_path / "m.onnx", ROWS)


def test_a_changed_weight_code_is_seen(convolutional, tmp_path):
    def edit(values):
        values["0.weight_codes"].reshape(-1)[:4] += 30

    with pytest.raises(AssertionError, match=r"simulation == artifact: .* \(\S+\) differs by \d+ codes; allowed 1"):
        simulation_equals_artifact(convolutional.quantized, broken_file(convolutional, tmp_path, edit), convolutional.inputs)


def test_a_bias_that_is_a_little_off_is_seen_by_the_number_of_entries(convolutional, tmp_path):
    def edit(values):
        values["0.bias_codes"] += (values["1_scale" if "1_scale" in values else "relu_scale"] * 0.2 / values["0.bias_scale"]).astype("int32")

    with pytest.raises(AssertionError, match=r"simulation == artifact: \d+\.\d+% of \d+ entries differ by a code; allowed 0\.5%"):
        simulation_equals_artifact(convolutional.quantized, broken_file(convolutional, tmp_path, edit), convolutional.inputs)


def test_a_wrong_last_layer_is_seen(convolutional, tmp_path):
    def edit(values):
        values["4.weight_scale"] *= 1.01

    with pytest.raises(AssertionError, match="from the same codes outputs differ by"):
        simulation_equals_artifact(convolutional.quantized, broken_file(convolutional, tmp_path, edit), convolutional.inputs)


def test_the_file_of_another_network_is_seen(convolutional, tmp_path):
    write(convolutional.network, tmp_path / "m.onnx")
    with pytest.raises(AssertionError, match="has 4 quantizers, the file 0"):
        simulation_equals_artifact(convolutional.quantized, tmp_path / "m.onnx", convolutional.inputs)


def test_artifact_is_as_near(convolutional, tmp_path):
    given = convolutional.network, convolutional.quantized
    assert artifact_is_as_near(*given, convolutional.path, convolutional.inputs, "onnxruntime").samples == 8

    def edit(values):
        values["0.weight_scale"] *= np.linspace(0.7, 1.3, 8).astype("float32")

    with pytest.raises(AssertionError, match=r"onnxruntime: the file is off by 0\.\d+, the simulation by 0\.\d+; allowed"):
        artifact_is_as_near(*given, broken_file(convolutional, tmp_path, edit), convolutional.inputs, "onnxruntime")


def test_weights_alone_are_compared_with_the_runtimes_own_rounding_allowed(tmp_path):
    made = int8(Net(lambda net, x: torch.tanh(x @ net.w) @ net.v, w=weight(64, 64), v=weight(64, 8)), torch.randn(2, 5, 64), activations="none")
    simulation_equals_artifact(made.quantized, made.path, made.inputs)

    def edit(values):
        values["v_scale"] *= 1.1

    with pytest.raises(AssertionError, match=r"allowed 0\.02"):
        simulation_equals_artifact(made.quantized, broken_file(made, tmp_path, edit), made.inputs)


# Techniques -----------------------------------------------------------------------------------------------------------------------


def setting() -> tuple[Network, Task]:
    model = perceptron()
    return capture(model, ROWS), task_of(model, ROWS)


def halved(network: Network, task: Task) -> Network:
    """A technique that is as it should be: weights with half the mantissa."""
    made = network.fork()
    for node in [node for node in made.graph.nodes if node.op == "get_attr"]:
        set_constant(made, node, made.tensor(str(node.target)).detach().half().float())
    return made


def test_a_sound_technique_passes_and_its_result_comes_back(tmp_path):
    network, task = setting()
    assert check_technique(halved, network, task, tmp_path).fingerprint() == halved(network, task).fingerprint()
    assert not list(tmp_path.iterdir())
    check_technique(Quantize(samples=16), network, task)


def test_the_laws_take_numpy_arrays(tmp_path):
    model, example = perceptron(), ROWS.numpy()
    network, batches = capture(model, ROWS), [(example, None)] * 4
    made = check_technique(Quantize(samples=8, correct=False), network, Task(model, example, {"calibrate": lambda: batches}), tmp_path)
    captured_equals_original(model, network, example)
    neutral_equals_identity(network, network.fork(), example)
    write(made, tmp_path / "m.onnx")
    assert simulation_equals_artifact(made, tmp_path / "m.onnx", example) == simulation_equals_artifact(made, tmp_path / "m.onnx", ROWS)
    assert artifact_is_as_near(network, made, tmp_path / "m.onnx", example, "onnxruntime").samples == 2


def in_place(network: Network, task: Task) -> Network:
    with torch.no_grad():
        network.tensor("0.weight").mul_(2)
    return network.fork()


def random(network: Network, task: Task) -> Network:
    return nudged(network, "0.weight", float(torch.rand(())))


def renamed(network: Network, task: Task) -> Network:
    made = network.fork()
    made.outputs = {"kind": "tuple", "items": [{"kind": "tensor"}]}
    return made


def rewritten(network: Network, function: Callable[[Any, Any], Any]) -> Network:
    """A fork whose output is ``function(graph, node)`` of what it was."""
    made = network.fork()
    output = next(node for node in made.graph.nodes if node.op == "output")
    with made.graph.inserting_before(output):
        output.args = ((function(lambda target, *args: made.graph.call_function(target, args), output.args[0][0]),),)  # type: ignore[index]
    made.recompile()
    return made


FAULTS = {
    "changes its input": (in_place, "changed the network it was given"),
    "gives its input back": (lambda network, task: network, "gave back the network it was given"),
    "is random": (random, "two calls with the same network and task gave two networks"),
    "changes the outputs": (renamed, r"the outputs were .*'tensor'.*; now they are .*'tuple'"),
    "another size": (
        lambda n, t: rewritten(n, lambda call, x: call(aten.slice.Tensor, x, 1, 0, 2)),
        r"float32\[2, 2\]; the original network gives .*\[2, 4\]",
    ),
    "another type": (
        lambda n, t: rewritten(n, lambda call, x: call(aten.to.dtype, x, torch.float64)),
        r"float64\[2, 4\]; the original network gives",
    ),
    "not a number": (lambda n, t: rewritten(n, lambda call, x: call(aten.sqrt.default, call(aten.sub.Tensor, x, 100.0))), "has NaN or infinity"),
    "one batch only": (lambda n, t: rewritten(n, lambda call, x: call(aten.reshape.default, x, [2, 4])), "invalid for input|shape"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_technique_that_breaks_the_contract_fails(name):
    technique, words = FAULTS[name]
    network, task = setting()
    with pytest.raises((AssertionError, RuntimeError), match=words):
        check_technique(technique, network, task)


def test_a_technique_whose_file_computes_something_else_fails(monkeypatch):
    network, task = setting()
    real = write

    def other(made, path, runtime):
        real(nudged(made, "2.bias", 0.5), path, runtime)

    monkeypatch.setattr("downsize.network.onnx_file.write", other)
    with pytest.raises(AssertionError, match="from the same codes outputs differ by"):
        check_technique(halved, network, task)


def test_a_technique_whose_result_cannot_be_exported_fails():
    network, task = setting()
    with pytest.raises(Exception, match="cannot be written as ONNX"):
        check_technique(lambda n, t: rewritten(n, lambda call, x: call(aten.digamma.default, x)), network, task)


def test_files_go_where_they_are_told(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    seen = []
    monkeypatch.setattr("downsize.network.onnx_file.ir.save", lambda model, path: (seen.append(Path(path)), onnx.save(_proto(model), path)))
    network, task = setting()
    check_technique(halved, network, task, kept)
    assert seen and all(kept in path.parents for path in seen) and shutil.disk_usage(kept)


def _proto(model: Any) -> Any:
    from onnxscript import ir

    return ir.to_proto(model)


def test_like_gives_other_batches():
    assert like(ROWS, 5, 0).shape == (5, 8)
