"""Walks without data against torch's fake tensors and against runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Net
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import ZOO, specimen

from downsize.network.capture import capture
from downsize.network.dry import dry_walk, shapes
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.statistics import walk
from downsize.runtimes import open_artifact


def forms(found: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    return {node: (value.shape, value.dtype) for node, value in found.items() if isinstance(value, Tensor)}


def dry(network: Network) -> dict[fx.Node, Any]:
    found: dict[fx.Node, Any] = {}
    dry_walk(network, {node: lambda args, value, node=node: found.__setitem__(node, value) for node in network.graph.nodes})
    return found


@pytest.mark.parametrize("name", [one.name if one.name in ("unet", "vit") else pytest.param(one.name, marks=pytest.mark.slow) for one in ZOO])
def test_shapes_and_types_are_those_of_fake_tensors_and_of_a_run(name: str):
    network = specimen(name)[1]
    fake: dict[fx.Node, Any] = {}
    hooks = {node: lambda args, value, node=node: fake.__setitem__(node, value) for node in network.graph.nodes}
    with FakeTensorMode(allow_non_fake_inputs=True):
        walk(network, [torch.empty(port.example, dtype=port.dtype) for port in network.ports], hooks)
    found = dry(network)
    assert forms(found) == forms(fake)
    assert all(value.device.type == "meta" for value in found.values() if isinstance(value, Tensor)), "the quick way was taken"
    fake.clear()
    walk(network, [torch.zeros(port.example, dtype=port.dtype) for port in network.ports], hooks)
    assert {node: tuple(value.shape) for node, value in fake.items() if isinstance(value, Tensor)} == shapes(network)


def test_what_depends_on_values_is_refused_without_them_and_found_on_zeros(tmp_path: Path):
    """The file computes what torch does, although the batch norm behind the linear layer asks for a shape."""
    model = Net(lambda net, x: (net.norm(net.layer(x)), x[x > -1]), layer=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)).eval()
    network = capture(model, torch.zeros(2, 4))
    with pytest.raises(Exception, match="nonzero"):
        dry(network)
    assert shapes(network)[next(node for node in network.graph.nodes if "batch_norm" in str(node.target))] == (2, 3)
    write(network, tmp_path / "m.onnx")
    x = torch.randn(5, 4)
    for got, expected in zip(open_artifact(tmp_path / "m.onnx", "onnxruntime")(x), model(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 3, 3), nn.ConvTranspose2d(4, 3, 3), nn.ConvTranspose3d(4, 3, 3)], ids=lambda layer: type(layer).__name__
)
def test_a_transposed_convolution_of_too_many_channels_is_refused(layer: Any):
    """The meta device alone would take it."""
    x = torch.zeros(2, 4, *(5,) * (layer.weight.dim() - 2))
    network = capture(layer.eval(), x)
    dry_walk(network, {}, [tuple(x.shape)])
    with pytest.raises(RuntimeError, match="channels"):
        dry_walk(network, {}, [(2, 5, *x.shape[2:])])


def test_an_error_of_a_hook_is_told_at_once():
    network, calls = specimen("residual")[1], []

    def hook(args: Any, value: Any) -> None:
        calls.append(value)
        raise ValueError("of the hook")

    with pytest.raises(ValueError, match="of the hook"):
        dry_walk(network, {node: hook for node in network.graph.nodes})
    assert len(calls) == 1
