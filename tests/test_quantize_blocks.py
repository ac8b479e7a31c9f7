"""``quantize(group=..., activations="dynamic")``: which inputs are rounded, what files compute, and chains with other techniques."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from block_files import BLOCKS, law, product_inputs
from small_nets import Net, in_onnxruntime, plain, task_of
from torch import Tensor, nn

import downsize as ds
from downsize.candidates import recipes_for
from downsize.errors import CutError, SpecError, TaskError
from downsize.network.network import Network
from downsize.quantization import blocks
from downsize.runtimes import RUNTIMES
from downsize.techniques import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import loaded_equals_live, simulation_equals_artifact

TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
ours = torch.ops.downsize


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """Inputs of layers as small as those of tests are rounded, too."""
    monkeypatch.setattr(blocks, "SMALLEST", 0)


def text_model() -> nn.Module:
    """A table, a gated residual block of three layers behind a norm, two of which share their input, and a head."""
    torch.manual_seed(0)
    parts = {"t": nn.Embedding(50, 96), "n": nn.LayerNorm(96), "a": nn.Linear(96, 70), "b": nn.Linear(96, 70), "c": nn.Linear(70, 96)}

    def forward(net: Any, ids: Tensor) -> Tensor:
        x = net.n(net.t(ids))
        return net.h(x + net.c(torch.relu(net.a(x)) * net.b(x)))

    return Net(forward, **parts, h=nn.Linear(96, 11)).eval()


def quantized(folder: Path, model: nn.Module | None = None, example: Any = TOKENS, **fields: Any) -> tuple[Network, Network, Path]:
    model = model or text_model()
    network = plain(model, example)
    made = Quantize(**{"activations": "dynamic", **fields})(network, task_of(model, example))
    RUNTIMES["onnxruntime"].export(made, folder / "model.onnx")
    return network, made, folder / "model.onnx"


def block_nodes(network: Network) -> list[torch.fx.Node]:
    return [node for node in network.graph.nodes if node.target is BLOCKS]


WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group": 32},
    "8 bits": {"group": 128},
    "zero points": {"bits": 4, "ends": 4, "tables": 4, "group": 16, "symmetric": False, "refit": False},
    "awq": {"bits": 4, "group": 32, "symmetric": False, "rounding": "awq"},
    "hqq": {"bits": 4, "group": 64, "symmetric": False, "rounding": "hqq"},
    "2 bits": {"bits": 2, "group": 32, "rounding": "nearest"},
}


@pytest.mark.parametrize("way", WAYS)
def test_files_multiply_in_integers_what_is_simulated(way, tmp_path):
    network, made, path = quantized(tmp_path, **WAYS[way])
    # Layers that read one value share its rounding.
    assert [len(node.users) for node in block_nodes(made)] == [2, 1, 1] and "weights_alone" not in made.origin
    assert len(product_inputs(onnx.load(path))) == 3 and in_onnxruntime(path)["MatMulNBits"] == 4
    for batch in (1, 9):
        law(made, path, torch.randint(0, 50, (batch, 7), generator=torch.Generator().manual_seed(batch)))
    assert simulation_equals_artifact(made, path, TOKENS).requantizations == 3
    loaded_equals_live(made, TOKENS)
    rounding = float((made.predict(TOKENS) - network.predict(TOKENS)).norm() / network.predict(TOKENS).norm())
    assert 0 < rounding < (0.5 if way == "2 bits" else 0.15)


def test_weights_are_those_of_weights_alone(tmp_path):
    fields = {"bits": 4, "group": 32, "symmetric": False}
    _, made, _ = quantized(tmp_path, **fields)
    _, alone, _ = quantized(tmp_path, activations="none", **fields)
    assert {name for name, _ in made.named_tensors()} == {name for name, _ in alone.named_tensors()}
    assert all(torch.equal(made.tensor(name), tensor) for name, tensor in alone.named_tensors())
    for node in block_nodes(made):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        made.graph.erase_node(node)
    made.recompile()
    assert torch.equal(made.predict(TOKENS), alone.predict(TOKENS))


def test_a_loud_token_does_not_drown_the_others(tmp_path):
    # Oracle: the float network. One scale for the whole tensor is set by the loudest token.
    torch.manual_seed(0)
    model, loud = nn.Sequential(nn.Linear(96, 64)), torch.randn(2, 7, 96)
    loud[:, 0] *= 300
    errors = {}
    for group in (None, 32):
        network, made, _ = quantized(tmp_path, model, loud, group=group, rounding="nearest")
        quiet = (network.predict(loud)[:, 1:], made.predict(loud)[:, 1:])
        errors[group] = float((quiet[0] - quiet[1]).norm() / quiet[0].norm())
    assert errors[32] < 0.02 < errors[None] / 10


def test_layers_without_such_a_kernel_keep_float_inputs_and_are_named(tmp_path, monkeypatch):
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 8, 3), "up": nn.Linear(36, 40), "end": nn.Linear(40, 5), "w": nn.Parameter(torch.randn(40, 40))}
    model = Net(lambda net, x: net.end(net.up(net.conv(x).flatten(2)) @ net.w), **parts).eval()
    images = torch.randn(2, 3, 8, 8)
    _, made, path = quantized(tmp_path, model, images, bits=4, ends=5, group=32)
    assert [next(iter(node.users)).meta["module"] for node in block_nodes(made)] == ["up"]
    assert set(made.origin["weights_alone"]) >= {"conv", "end"} and len(made.origin["weights_alone"]) == 3  # and the product with w
    law(made, path, torch.randn(4, 3, 8, 8))
    monkeypatch.setattr(blocks, "SMALLEST", 36 * 40 + 1)
    _, made, _ = quantized(tmp_path, model, images, bits=4, group=32)
    assert not block_nodes(made) and "up" in made.origin["weights_alone"]
    with pytest.raises(TaskError, match="no linear layer or LSTM"):
        quantized(tmp_path, nn.Sequential(nn.Conv2d(3, 4, 3)), images, group=32)


def test_kept_layers_read_what_they_did(tmp_path):
    _, made, path = quantized(tmp_path, bits=4, group=32, keep=("a",))
    assert [[user.meta["module"] for user in node.users] for node in block_nodes(made)] == [["b"], ["c"], ["h"]]
    law(made, path, TOKENS)


def test_lstms_take_their_own_integers_beside_layers_in_blocks(tmp_path):
    torch.manual_seed(0)
    parts = {
        "t": nn.Embedding(50, 32),
        "rnn": nn.LSTM(32, 48, batch_first=True),
        "gru": nn.GRU(48, 24, batch_first=True),
        "h": nn.Linear(24, 40),
        "end": nn.Linear(40, 5),
    }
    model = Net(lambda net, x: net.end(net.h(net.gru(net.rnn(net.t(x))[0])[0])), **parts).eval()
    network, made, path = quantized(tmp_path, model, bits=4, group=16)
    assert made.origin["weights_alone"] == ["gru"] and len(block_nodes(made)) == 2
    executed = in_onnxruntime(path)
    assert executed["DynamicQuantizeLSTM"] == 1 and executed["GRU"] == 1 and executed["MatMulNBits"] == 2
    got, expected = np.asarray(ds.open(path, runtime="onnxruntime")(TOKENS)), made.predict(TOKENS).numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(expected - network.predict(TOKENS).numpy()).max() < 0.2 * np.abs(expected).max()


# Chains ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["prune(macs=0.7, samples=16)", "factorize(macs=0.8, samples=16)", "sparsify(sparsity=0.5, keep_ends=False)"])
def test_chains_end_in_files_that_compute_what_is_simulated(before, tmp_path):
    model = text_model()
    task = task_of(model, TOKENS)
    network = plain(model, TOKENS)
    for step in ds.Recipe.parse(f"{before} | quantize(activations='dynamic', bits=4, group=32, samples=16)").steps:
        network = step(network, task)
    RUNTIMES["onnxruntime"].export(network, tmp_path / "model.onnx")
    assert len(block_nodes(network)) >= 3
    law(network, tmp_path / "model.onnx", torch.randint(0, 50, (4, 7)))
    loaded_equals_live(network, TOKENS)


@pytest.mark.parametrize("behind", ["prune(macs=0.7)", "factorize(macs=0.8)", "sparsify(sparsity=0.5)", "compensate(rank=2)"])
def test_what_would_leave_the_integers_is_refused_behind_it(behind, tmp_path):
    _, made, _ = quantized(tmp_path, bits=4, group=32)
    with pytest.raises((TaskError, CutError), match="quantize"):
        ds.Recipe.parse(behind).steps[0](made, task_of(text_model(), TOKENS))


def test_zeros_survive():
    model = text_model()
    task = task_of(model, TOKENS)
    sparse = Sparsify(sparsity=0.5, keep_ends=False)(plain(model, TOKENS), task)
    made = Quantize(activations="dynamic", bits=4, group=32)(sparse, task)
    zeros = sparse.tensor("a.weight") == 0
    assert float(zeros.float().mean()) > 0.3 and bool((made.tensor("a.weight")[zeros] == 0).all())


# What is asked for ----------------------------------------------------------------------------------------------------------------


def test_text_yaml_and_python_say_the_same():
    technique = Quantize(activations="dynamic", bits=4, group=32, symmetric=False)
    recipe = ds.Recipe.parse("quantize(bits=4, group=32, symmetric=False, activations='dynamic')")
    assert recipe.steps == (technique,)
    assert ds.Recipe.parse(str(recipe)) == recipe == ds.Recipe.from_yaml(recipe.to_yaml())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3, "group": 32}, "bits=3 came with a group and dynamic activations"),
        ({"bits": 2, "group": 16}, "or 2 in groups of 32 to 128"),
        ({"levels": "nf4", "group": 32}, "levels='nf4' came with a group"),
        ({"profile": "avx2", "group": 32}, "profile='avx2' came with a group"),
        ({"symmetric": False}, "symmetric=False is for weights alone, or a group"),
        ({"rounding": "hqq", "group": 32}, "symmetric=False"),
        ({"rounding": "awq"}, "rounding='awq' is for weights alone, or a group"),
        ({"group": 32, "train": True}, "not trained"),
        ({"group": 32, "bits": 32}, "bits=32"),
    ],
)
def test_what_no_kernel_does_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        Quantize(activations="dynamic", **fields)


def test_fit_tries_it_for_large_linear_layers_in_onnxruntime():
    def of(width: int) -> Network:
        return plain(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)), torch.randn(2, width))

    wanted = "quantize(activations='dynamic', rounding='nearest', group=128)"
    fast = ("avx2", "avx512_vnni")
    assert wanted in recipes_for("onnxruntime", of(384), fast) and wanted not in recipes_for("onnxruntime", of(64), fast)
    assert wanted not in recipes_for("openvino", of(384), fast) and wanted not in recipes_for("onnxruntime", of(384), ("avx2",))
    assert str(ds.Recipe.parse(wanted)) == wanted
