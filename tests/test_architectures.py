"""Every architecture of tests/architectures.py: captured, saved, loaded, and run as an ONNX file at another batch size; random ones captured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN, with_attention
from captures import architecture, made
from hypothesis import given, settings
from random_nets import FEATURE_MAPS, SEQUENCES, Plan, Shape, Step, networks
from small_nets import Net
from torch import nn
from transformers_architectures import TRANSFORMERS
from zoo import Specimen, assert_close, run

from downsize.errors import ExportError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.runtimes import open_artifact
from downsize.structure import flatten
from downsize.testing import loaded_equals_live

# No mask, a mask of padding, a causal one with grouped heads, biases of positions, and windows.
WITH_ATTENTION = ["vit", "bert", "llama", "t5", "swin"]
WRITTEN_ELSEWHERE = {"bert", "gpt2", "llama", "segformer", "swin", "t5", "vit"}
EVERY = [*(one.name for one in HAND_WRITTEN), *(pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMERS)]


def assert_file_runs(network: Network, specimen: Specimen, path) -> None:
    write(network, path)
    session = open_artifact(path, "onnxruntime")
    for batch in (1, 3):
        expected, got = network.predict(specimen.inputs(batch)), session(specimen.inputs(batch))
        assert flatten(expected)[1] == flatten(got)[1]
        assert_close(flatten(got)[0], flatten(expected)[0])


def test_names_are_those_of_the_specimens():
    assert len(ARCHITECTURES) == len(HAND_WRITTEN) + len(TRANSFORMERS)
    assert all(name == specimen.name for name, specimen in ARCHITECTURES.items())


@pytest.mark.parametrize("name", EVERY)
def test_captured_equals_original(name):
    model, network = architecture(name)
    for batch in (1, 3, 4):
        inputs = ARCHITECTURES[name].inputs(batch)
        assert_close(network.predict(inputs), run(model, inputs))


@pytest.mark.parametrize("name", EVERY)
def test_loaded_equals_live(name):
    loaded_equals_live(architecture(name)[1], ARCHITECTURES[name].inputs(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WRITTEN_ELSEWHERE])
def test_runs_in_onnxruntime(name, tmp_path):
    """The others in test_onnx_file.py."""
    assert_file_runs(architecture(name)[1], ARCHITECTURES[name], tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_in_plain_operators_computes_the_same(name, tmp_path):
    specimen = with_attention(ARCHITECTURES[name], "eager")
    model, network = made(specimen)
    assert not [node for node in network.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert [node for node in architecture(name)[1].graph.nodes if "scaled_dot_product" in str(node.target)]
    inputs = specimen.inputs(3)
    assert_close(network.predict(inputs), run(model, inputs))
    assert_close(network.predict(inputs), architecture(name)[1].predict(inputs), 1e-4)
    assert_file_runs(network, specimen, tmp_path / "model.onnx")


POOLED = {"even": (2, 4, 2), "uneven": (3, 2, 4), "more than there are": (9, 1, 5), "one": (1, 1, 1)}


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("sizes", POOLED.values(), ids=POOLED)
def test_adaptive_average_in_three_dimensions(sizes, rank, tmp_path):
    """Against the definition: the mean from floor(i n / m) to ceil((i + 1) n / m), here in numpy."""
    x = torch.randn(2, 3, 8, 4, 6)[(0,) * (5 - rank)]
    model = Net(lambda net, x: net.pool(x * 1.0), pool=nn.AdaptiveAvgPool3d(sizes)).eval()
    write(capture(model, x), tmp_path / "m.onnx")
    expected = x.double().numpy()
    for axis, size in zip((-3, -2, -1), sizes, strict=True):
        n = expected.shape[axis]
        bins = [np.arange(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        expected = np.stack([expected.take(chosen, axis).mean(axis) for chosen in bins], axis)
    np.testing.assert_allclose(open_artifact(tmp_path / "m.onnx", "onnxruntime")(x).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_adaptive_average_of_an_open_size_is_refused_by_name(tmp_path):
    model = Net(lambda net, x: net.pool(x * 1.0), pool=nn.AdaptiveAvgPool3d(2)).eval()
    network = capture(model, torch.randn(2, 3, 8, 8, 8), more=[torch.randn(2, 3, 6, 6, 6)])
    with pytest.raises(ExportError, match="adaptive_avg_pool3d"):
        write(network, tmp_path / "m.onnx")


# Random architectures --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=20)
@given(networks())
def test_random_networks_are_captured(specimen):
    model, network = made(specimen)
    for batch in (1, 3):
        assert_close(network.predict(specimen.inputs(batch)), run(model, specimen.inputs(batch)))


@pytest.mark.parametrize("step", [Step(make, 16, variant) for make in (*FEATURE_MAPS, *SEQUENCES) for variant in range(4)], ids=str)
def test_blocks_have_the_shape_they_say(step):
    at = Shape(16, 6)
    block, then = step.make(at, step.width, step.variant)
    shape, expected = (
        ((2, 16, 6, 6), (2, then.channels, then.size, then.size)) if step.make in FEATURE_MAPS else ((2, 6, 16), (2, then.size, then.channels))
    )
    assert block.eval()(torch.randn(shape)).shape == expected


def test_a_drawn_network_is_the_same_whenever_it_is_made():
    plan = Plan("picture", (Step(FEATURE_MAPS[1], 16, 2),), True, (Step(SEQUENCES[3], 8, 1),), 2, 5)
    specimen = Specimen(str(plan), plan.build, plan.inputs)
    one, two = (specimen.make().state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.0.1.running_var"], torch.ones(8))
