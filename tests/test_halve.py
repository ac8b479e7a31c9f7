"""Sixteen bits: rounding against numpy, files against rounded weights bit by bit, what overflows, and bfloat16 products in OpenVINO."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# (modules type every attribute as a tensor or a module)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small_nets import Net, conv, like, needs_openvino, task_of
from torch import nn

import downsize as ds
from downsize.errors import ArtifactError, SpecError, TaskError
from downsize.network.capture import capture
from downsize.network.lower_halves import ROUND
from downsize.network.network import Network
from downsize.network.rewrite import drop_identities, fold_batch_norm
from downsize.numerics.halves import loss_of, round_to
from downsize.runtimes import RUNTIMES, open_artifact
from downsize.testing import artifact_is_as_near, check_technique, simulation_equals_artifact

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def convolutional() -> nn.Module:
    layers = nn.Sequential(conv(3, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16), nn.Flatten(), nn.Linear(1024, 5))
    nn.init.uniform_(layers[1].running_var, 0.5, 2.0)
    return layers.eval()


def attentive() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return Net(lambda net, x: net.layer(net.table(x)) @ net.table.weight.t(), table=nn.Embedding(50, 16), layer=layer).eval()


def recurrent() -> nn.Module:
    return Net(lambda net, x: net.lstm(net.table(x))[0], table=nn.Embedding(50, 16), lstm=nn.LSTM(16, 24, batch_first=True)).eval()


CASES: dict[str, tuple[Any, torch.Tensor]] = {
    "convolutional": (convolutional, IMAGE),
    "attentive": (attentive, TOKENS),
    "recurrent": (recurrent, TOKENS),
}


def halved(model: nn.Module, example: torch.Tensor, **options: Any) -> tuple[Network, Network]:
    network = capture(model, (example,))
    return network, ds.halve(**options)(network, task_of(model, (example,)))


def written(network: Network, folder: Path, runtime: str = "onnxruntime") -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    RUNTIMES[runtime].export(network, path)
    return path


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Half to even on the upper half of the bits of float32."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_rounding_is_that_of_numpy_with_ties_and_numbers_below_the_normal_ones() -> None:
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-9, 6e-8, 2e-8, 1e-6, -3e-5, 65519, 65504, 0.0, -0.0], np.float32)
    x = np.concatenate([ties, np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 10.0 ** np.arange(-9, 1).repeat(500)]).astype(
        np.float32
    )
    assert np.array_equal(round_to(torch.from_numpy(x), torch.float16).numpy(), x.astype(np.float16).astype(np.float32))
    assert np.array_equal(round_to(torch.from_numpy(x), torch.bfloat16).numpy(), to_bfloat16(x))


def test_the_gradient_of_rounding_is_straight_through() -> None:
    x = torch.randn(7, requires_grad=True)
    (round_to(x, torch.float16) * torch.arange(7.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == list(range(7))


def test_what_is_lost_is_counted_as_numpy_counts_it() -> None:
    x = np.float32([65519.9, 65520, -1e30, np.inf, 0, 2.9e-8, 3.1e-8, -1e-9])
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    overflowed, vanished = int((np.isinf(half) & np.isfinite(x)).sum()), int(((half == 0) & (x != 0)).sum())
    found = loss_of(torch.from_numpy(x), torch.float16)
    assert (found.overflowed, found.vanished) == (overflowed, vanished) == (2, 2)
    assert found.largest == np.float32(1e30)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_file_computes_bit_by_bit_what_one_of_rounded_weights_does(name: str, dtype: str, tmp_path: Path) -> None:
    build, example = CASES[name]
    network, made = halved(build(), example, dtype=dtype)
    oracle = network.copy().eval()
    drop_identities(oracle)
    fold_batch_norm(oracle)
    round_numpy = to_bfloat16 if dtype == "bfloat16" else lambda x: x.astype(np.float16).astype(np.float32)
    with torch.no_grad():
        for _, tensor in oracle.named_tensors():
            if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                tensor.data = torch.from_numpy(round_numpy(tensor.detach().numpy()))
    inputs = like((example,), 3, 5)
    path, float_path = written(made, tmp_path), written(oracle, tmp_path)
    got, expected = (open_artifact(file, "onnxruntime")(inputs) for file in (path, float_path))
    assert torch.equal(got, expected)
    short, kind = ("bf16", onnx.TensorProto.BFLOAT16) if dtype == "bfloat16" else ("f16", onnx.TensorProto.FLOAT16)
    weights = {name for name, tensor in oracle.named_tensors() if isinstance(tensor, nn.Parameter) and tensor.dim() > 1}
    initializers = onnx.load(str(path)).graph.initializer
    assert {item.name for item in initializers if item.data_type == kind} == {f"{name}_{short}" for name in weights}
    floats = sum(int(np.prod(item.dims)) for item in initializers if item.data_type == onnx.TensorProto.FLOAT)
    biases = sum(tensor.numel() for _, tensor in oracle.named_tensors() if tensor.dim() == 1)
    assert floats <= biases + len(initializers)


def test_the_file_is_half_as_large_and_names_that_are_kept_are_exact(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = torch.randn(2, 64)
    network, made = halved(model, x)
    before, after = written(network, tmp_path).stat().st_size, written(made, tmp_path).stat().st_size
    assert after < 0.53 * before
    _, kept = halved(model, x, keep=("2",))
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(str(written(kept, tmp_path))).graph.initializer}
    assert np.array_equal(stored["2.weight"], model[2].weight.detach().numpy())
    assert stored["0.weight_f16"].dtype == np.float16
    with pytest.raises(SpecError, match=r"keep='third' names none of the weights.*Known: 0.weight, 2.weight"):
        halved(model, x, keep=("third",))


@pytest.mark.parametrize(
    ("name", "options"), [("convolutional", {}), ("convolutional", {"compute": True}), ("attentive", {"dtype": "bfloat16", "compute": True})]
)
def test_it_keeps_the_contract_of_techniques(name: str, options: dict[str, Any]) -> None:
    build, example = CASES[name]
    model = build()
    check_technique(ds.halve(**options), capture(model, (example,)), task_of(model, (example,)))


@pytest.mark.parametrize("name", ["convolutional", "attentive"])
def test_computing_rounds_what_products_read(name: str) -> None:
    """Forward hooks that round the inputs of the user's layers, whose weights are rounded, give the same."""
    build, example = CASES[name]
    model = build()
    _, made = halved(model, example, dtype="bfloat16", compute=True)
    read = {node.args[0] for node in made.graph.nodes if node.target is ROUND and node.args[0].op != "get_attr"}
    assert len(read) >= 3
    if name == "convolutional":
        expected = example
        folded = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
        with torch.no_grad():
            for layer in (folded, nn.ReLU(), model[3], nn.Flatten(), model[5]):
                if hasattr(layer, "weight"):
                    layer.weight.data = torch.from_numpy(to_bfloat16(layer.weight.numpy(force=True)))
                    expected = torch.from_numpy(to_bfloat16(expected.numpy()))
                expected = layer(expected)
        assert torch.allclose(made.predict((example,)), expected, rtol=0, atol=2e-2 * float(expected.abs().max()) / 10)


@needs_openvino
@pytest.mark.parametrize("name", ["convolutional", "attentive"])
def test_openvino_computes_in_bfloat16_where_the_file_says_so_and_nowhere_else(name: str, tmp_path: Path) -> None:
    from downsize.runtimes.openvino import precisions

    build, example = CASES[name]
    model = build()
    network, made = halved(model, example, dtype="bfloat16", compute=True)
    inputs = like((example,), 16, 5)
    path = written(made, tmp_path, "openvino")
    artifact_is_as_near(network, made, path, inputs, "openvino")
    got = open_artifact(path, "openvino")(inputs)
    _, stored = halved(model, example, dtype="bfloat16")
    exact = open_artifact(written(stored, tmp_path, "openvino"), "openvino")(inputs)
    gap = float((got - exact).norm() / exact.norm())
    assert float((exact - stored.predict(inputs)).norm() / exact.norm()) < 1e-5
    assert gap > 2e-4 if "bf16" in precisions() else gap < 1e-5


@needs_openvino
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_openvino_widens_weights_exactly(dtype: str, tmp_path: Path) -> None:
    _, made = halved(recurrent(), TOKENS, dtype=dtype)
    inputs = like((TOKENS,), 3, 5)
    expected, got = made.predict(inputs), open_artifact(written(made, tmp_path, "openvino"), "openvino")(inputs)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_weights_beyond_the_range_are_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    model[1].weight.data[2, 3] = -70000.0
    x = torch.randn(2, 16)
    with pytest.raises(
        TaskError, match=r"1 of 64 numbers of 1.weight are beyond float16, which ends at 65504: the largest is 70000. dtype='bfloat16'"
    ):
        halved(model, x)
    _, made = halved(model, x, dtype="bfloat16")
    assert "1.weight" in dict(made.named_tensors())
    halved(model, x, keep=("1.weight",))


def test_inner_values_beyond_the_range_are_refused_with_their_layer_when_products_are_in_float16() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    model[0].weight.data.fill_(2e4)
    model[1].weight.data.fill_(1e-3)
    x = torch.ones(2, 16)
    largest = max(float(model[0](*inputs).detach().abs().max()) for inputs, _ in task_of(model, (x,)).batches("calibrate"))
    assert largest > 65504
    with pytest.raises(TaskError, match=rf"linear \(0\) reaches {largest:g} on the calibration data, beyond float16"):
        halved(model, x, compute=True)
    halved(model, x, compute=True, dtype="bfloat16")
    halved(model, x)


def test_weights_that_become_zero_are_counted_and_told() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    model[0].weight.data[0, :5] = 1e-9
    _, made = halved(model, torch.randn(2, 16))
    assert made.origin["halved"] == {"dtype": "float16", "computed in it": False, "weights": 256, "became zero": 5}


def test_weights_that_are_integers_already_stay_so_and_the_others_are_halved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    x = torch.randn(4, 32)
    network, task = capture(model, (x,)), task_of(model, (x,))
    made = ds.halve(dtype="bfloat16", compute=True)(ds.quantize(keep=("2",), smooth=False)(network, task), task)
    path = written(made, tmp_path)
    kinds = {item.name: item.data_type for item in onnx.load(str(path)).graph.initializer}
    assert kinds["2.weight_bf16"] == onnx.TensorProto.BFLOAT16
    assert onnx.TensorProto.INT8 in {kind for name, kind in kinds.items() if name.startswith("0.weight")}
    simulation_equals_artifact(made, path, (x,))


def test_a_process_that_made_nothing_loads_the_network(tmp_path: Path) -> None:
    _, made = halved(convolutional(), IMAGE, compute=True)
    made.save(tmp_path / "network")
    code = "import sys; from downsize.network.network import Network; print(Network.load(sys.argv[1]).fingerprint())"
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "network")], capture_output=True, text=True, check=True).stdout
    assert out.strip() == made.fingerprint()


def test_a_file_that_asks_for_a_precision_that_is_none_is_refused(tmp_path: Path) -> None:
    _, made = halved(convolutional(), IMAGE, dtype="bfloat16", compute=True)
    path = written(made, tmp_path)
    model = onnx.load(str(path))
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"bf16"', '"int7"')
    onnx.save(model, str(path))
    with pytest.raises(ArtifactError, match="precision 'int7'"):
        open_artifact(path, "onnxruntime")
