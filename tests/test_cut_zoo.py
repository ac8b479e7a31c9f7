"""Every architecture of tests/architectures.py: covered by axes, cut as it is masked, saved, written as ONNX and run, cut again and quantized."""

from __future__ import annotations

import functools
import random

import pytest
from architectures import ARCHITECTURES
from captures import architecture
from small_nets import task_of
from test_cut import EXACT, STATISTIC, gap

from downsize.network.cut import cut
from downsize.network.fold import fold_constants
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.runtimes import open_artifact
from downsize.techniques.quantize import Quantize
from downsize.testing import cut_equals_masked, loaded_equals_live

FAST = ("squeeze_excite", "shufflenet", "fused_qkv_vit")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
# What may stay uncovered, of all parameter elements: 2 % (outputs, vocabularies' biases, small heads); more where something is frozen.
UNCOVERED = {
    "shufflenet": 0.08,  # the first half of the channels meets itself shuffled
    "yolos": 0.17,  # the stream is an output
    "detr": 0.03,
    "t5": 0.06,
}


@functools.cache
def lineage_of(name: str) -> Lineage:
    network = architecture(name)[1].fork()
    fold_constants(network)
    return Lineage(network)


def some(lineage: Lineage, seed: int, exact: bool | None = None) -> dict[str, list[int]]:
    """Up to two thirds of the units of every axis, at random: of the exact ones, the others, or all."""
    rng = random.Random(seed)
    axes = [axis for axis in lineage.axes if axis.units > 1 and exact in (None, axis.exact)]
    return {axis.name: sorted(rng.sample(range(axis.units), rng.randint(1, max(1, 2 * axis.units // 3)))) for axis in axes}


@functools.cache
def cut_at_random(name: str, seed: int = 1) -> Network:
    lineage = lineage_of(name)
    return cut(lineage, some(lineage, seed))


@pytest.mark.parametrize("name", EVERY)
def test_coverage(name):
    assert lineage_of(name).coverage() >= 1 - UNCOVERED.get(name, 0.02)


@pytest.mark.parametrize("name", EVERY)
def test_cut_equals_masked(name):
    """All exact axes at once, all axes at once, and axes one by one, each at other batch sizes than the captured one too."""
    lineage, inputs = lineage_of(name), ARCHITECTURES[name].inputs(3)
    exact, every = some(lineage, 1, exact=True), some(lineage, 2)
    cut_equals_masked(lineage.network, exact, inputs, EXACT)
    made = cut_equals_masked(lineage.network, every, inputs, STATISTIC)
    assert gap(made.predict(inputs), lineage.network.predict(inputs)) > STATISTIC
    rng = random.Random(3)
    for axis in rng.sample(sorted(every), min(4, len(every))):
        cut_equals_masked(lineage.network, {axis: every[axis]}, inputs, EXACT if lineage.axis(axis).exact else STATISTIC)


@pytest.mark.parametrize("name", EVERY)
def test_a_cut_network_is_smaller_and_loads_bit_equal(name):
    made = cut_at_random(name)
    old, new = (sum(parameter.numel() for parameter in network.parameters()) for network in (lineage_of(name).network, made))
    assert new < old
    loaded_equals_live(made, ARCHITECTURES[name].inputs(3))


@pytest.mark.parametrize("name", EVERY[::2])
def test_a_cut_network_runs_in_onnxruntime_at_other_batch_sizes(name, tmp_path):
    """Every second one: whole, they are all written in test_architectures.py, and pruned files in test_prune.py."""
    made = cut_at_random(name)
    write(made, tmp_path / "cut.onnx")
    session = open_artifact(tmp_path / "cut.onnx", "onnxruntime")
    for batch in (1, 3):
        inputs = ARCHITECTURES[name].inputs(batch)
        assert gap(session(inputs), made.predict(inputs)) < 1e-4


# Chains ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_what_was_cut_can_be_cut_again(name):
    """The second cut is proven like the first, and both together remove what one cut of the same units does."""
    first = cut_at_random(name, 4)
    again = Lineage(first)
    cut_equals_masked(first, some(again, 5), ARCHITECTURES[name].inputs(3), STATISTIC)
    assert again.coverage() > 0


@pytest.mark.parametrize("name", EVERY)
def test_units_that_go_one_after_the_other_go_as_at_once(name):
    """Unit 0 and then again unit 0, of the axis with the most units, is units 0 and 1."""
    lineage, inputs = lineage_of(name), ARCHITECTURES[name].inputs(3)
    axis = max((axis for axis in lineage.axes if axis.exact), key=lambda axis: axis.units)
    once = cut(lineage, {axis.name: [0, 1]})
    step = cut(lineage, {axis.name: [0]})
    twice = cut(step, {axis.name: [0]})
    assert gap(twice.predict(inputs), once.predict(inputs)) < EXACT
    assert {name: tensor.shape for name, tensor in twice.named_tensors()} == {name: tensor.shape for name, tensor in once.named_tensors()}


@pytest.mark.parametrize(
    "name", ["squeeze_excite", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "bert", "resnet_basic", "vit"))]
)
def test_a_cut_network_can_be_quantized(name, tmp_path):
    made, inputs = cut_at_random(name), ARCHITECTURES[name].inputs(3)
    specimen = ARCHITECTURES[name]
    quantized = Quantize()(made, task_of(specimen.make(), specimen.inputs(2)))
    write(quantized, tmp_path / "int8.onnx")
    got = open_artifact(tmp_path / "int8.onnx", "onnxruntime")(inputs)
    assert gap(got, quantized.predict(inputs)) < 0.05
    assert 0 < gap(quantized.predict(inputs), made.predict(inputs)) < 0.3
