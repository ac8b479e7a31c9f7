"""Inputs rounded at run time in blocks of columns: the operator against numpy, and files against the simulation in the real runtimes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import forgery
import numpy as np
import onnx
import pytest
import torch
from block_files import product_inputs
from packed_nets import Way, quantized
from small_nets import Net, needs_openvino
from torch import Tensor, nn

import downsize as ds
from downsize.measure.host import host
from downsize.network.cost import count
from downsize.network.lower import lower
from downsize.network.network import Network
from downsize.network.onnx_file import decodings, write
from downsize.network.rewrite import aten, insert_after
from downsize.numerics import groups
from downsize.quantization.insertion import settle
from downsize.testing import loaded_equals_live

BLOCKS = torch.ops.downsize.fake_quantize_blocks.default
fake_quantize_blocks = torch.ops.downsize.fake_quantize_blocks
# Processors for which ONNX Runtime surely has integer kernels; without them it computes as for floats.
INTEGERS = bool({"avx512_vnni", "avx_vnni"} & set(host().features))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(x: np.ndarray, group: int) -> np.ndarray:
    """Block by block, in float32 as the kernel does."""
    made = np.zeros_like(x)
    for start in range(0, x.shape[-1], group):
        block = x[..., start : start + group]
        extreme = np.abs(block).max(-1, keepdims=True)
        inverse = np.divide(np.float32(127), extreme, where=extreme > 0, out=np.zeros_like(extreme))
        made[..., start : start + group] = np.rint(block * inverse) * (extreme / np.float32(127))
    return made


# The operator ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 5, 50), (4, 7), (0, 40), (2, 3, 4, 33)])
@pytest.mark.parametrize("group", [1, 16, 32, 128])
def test_the_operator_is_the_closed_form(shape, group):
    x = draw(*shape) * 10 ** draw(*shape[:-1], 1, seed=1)
    x[..., : shape[-1] // 2] *= x[..., : shape[-1] // 2] > 0  # half-empty blocks, and empty ones
    np.testing.assert_allclose(fake_quantize_blocks(x, group).numpy(), by_numpy(x.numpy(), group), rtol=1e-6, atol=0)


def test_codes_are_whole_rounded_to_even_and_the_extreme_of_a_block_stays():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 0.0, 0.0, 0.0, 0.0, -254.0, 3.0, 5.0, 1.0]])
    assert fake_quantize_blocks(x, 4).tolist() == [[127.0, 0.0, 2.0, -2.0, 0.0, 0.0, 0.0, 0.0, -254.0, 4.0, 4.0, 0.0]]
    rounded = fake_quantize_blocks(draw(5, 96), 32)
    torch.testing.assert_close(fake_quantize_blocks(rounded, 32), rounded, rtol=1e-6, atol=0)  # what is rounded already is left


def test_rows_and_blocks_do_not_touch_each_other():
    x = draw(4, 64)
    other = x.clone()
    other[1, :32] *= 1000
    gone = (fake_quantize_blocks(x, 32) != fake_quantize_blocks(other, 32)).nonzero()
    assert len(gone) and set(gone[:, 0].tolist()) == {1} and int(gone[:, 1].max()) < 32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(bad):
    x = draw(3, 64)
    x[1, 40] = bad
    made = fake_quantize_blocks(x, 32)
    assert not made[1, 40].isfinite() and bool(made[[0, 2]].isfinite().all()) and bool(made[1, :32].isfinite().all())


def test_tiny_blocks_become_zero_and_none_overflows():
    x = torch.tensor([[1e-40, 1e-38], [3e38, -1e38], [1e-29, -1e-31]])
    made = fake_quantize_blocks(x, 2)
    assert made[0].tolist() == [0.0, 0.0] and bool(made.isfinite().all())
    assert float(made[2, 0]) == pytest.approx(1e-29, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_operator_is_sound_for_torch_and_its_gradient_goes_straight_through(dtype):
    x = draw(4, 50).to(dtype).requires_grad_()
    torch.library.opcheck(groups.fake_quantize_blocks, (x, 16))
    upstream = draw(4, 50, seed=3).to(dtype)
    (fake_quantize_blocks(x, 16) * upstream).sum().backward()
    assert torch.equal(x.grad, upstream)  # type: ignore[arg-type]


# Files ----------------------------------------------------------------------------------------------------------------------------


def rounded(build: Any, example: Any, ways: dict[str, Way], group: int) -> Network:
    """A network with such weights, the inputs of all its linear layers rounded in blocks."""
    network = quantized(build, example, ways)
    for layer in [node for node in network.graph.nodes if node.target is aten.linear.default]:
        insert_after(network, layer.args[0], BLOCKS, (group,), [layer])
    network.recompile()
    return network


WAYS = [
    *(Way(bits, group, asymmetric) for bits, group in ((4, 16), (4, 32), (4, 128), (8, 32), (8, 128), (2, 64)) for asymmetric in (False, True)),
    *(Way(bits, channels=True) for bits in (4, 8)),
]
EXAMPLES = {"sequences": (2, 5, 96), "rows": (2, 96), "odd columns": (2, 50), "a part of a block": (3, 2, 12)}


def single(way: Way, example: Tensor, group: int) -> Network:
    return rounded(lambda: nn.Sequential(nn.Linear(example.shape[-1], 33)), example, {"0.weight": way}, group)


def side_by_side(example: Tensor, kinds: list[Way]) -> Network:
    """A layer of each kind, all of the same input, rounded in the weight's groups (of 32 columns for a scale a row)."""
    columns = example.shape[-1]

    def build() -> nn.Module:
        layers = nn.ModuleList(nn.Linear(columns, 33, bias=number % 3 > 0) for number, _ in enumerate(kinds))
        return Net(lambda net, x: tuple(layer(x) for layer in net.layers), layers=layers)

    # A row shorter than its group has one scale, as quantize() gives it.
    ways = {f"layers.{number}.weight": way._replace(group=min(way.group, columns)) for number, way in enumerate(kinds)}
    network = quantized(build, example, ways)
    for layer, way in zip([node for node in network.graph.nodes if node.target is aten.linear.default], kinds, strict=True):
        insert_after(network, layer.args[0], BLOCKS, (way.group or 32,), [layer])
    network.recompile()
    return network


def by_hand(network: Network, x: np.ndarray, kinds: list[Way], floats: bool = False) -> list[np.ndarray]:
    """Each layer's output: its input rounded by numpy, unless ``floats``, times the weight as the network has it."""
    made = []
    for layer, way in zip([node for node in network.graph.nodes if node.target is aten.linear.default], kinds, strict=True):
        fake, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
        weight = fake.target(*(network.tensor(str(part.target)) for part in fake.args[:3]), *fake.args[3:]).detach().numpy()
        shift = 0 if bias is None else network.tensor(bias.target).detach().numpy()
        made.append((x if floats else by_numpy(x, way.group or 32)) @ weight.T + shift)
    return made


def gaps(expected: list[np.ndarray], got: Any) -> list[float]:
    return [float(np.abs(one - np.asarray(two)).max() / np.abs(one).max()) for one, two in zip(expected, got, strict=True)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_onnxruntime_multiplies_in_integers_what_is_simulated(name, tmp_path):
    example = draw(*EXAMPLES[name])
    network = side_by_side(example, WAYS)
    write(network, tmp_path / "model.onnx", "onnxruntime")
    nodes = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "MatMulNBits"]
    assert [one.i for node in nodes for one in node.attribute if one.name == "accuracy_level"] == [4] * len(WAYS)
    assert {one.when for one in decodings(network, "onnxruntime")} == {"in the kernel"}
    for batch in (1, 3, 40):
        x = draw(batch, *example.shape[1:], seed=batch)
        x[-1] *= 1000
        got, of_integers = ds.open(tmp_path / "model.onnx", runtime="onnxruntime")(x), by_hand(network, x.numpy(), WAYS)
        of_floats = gaps(by_hand(network, x.numpy(), WAYS, floats=True), got)
        wrong = {
            str(way): gap
            for way, gap, other in zip(WAYS, gaps(of_integers, got), of_floats, strict=True)
            if gap > 1e-5 and (INTEGERS or other > 1e-5)
        }
        assert not wrong
        assert max(gaps(of_integers, network.predict(x))) < 1e-5


@pytest.mark.parametrize("runtime", ["", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("name", ["sequences", "odd columns", "a part of a block"])
def test_other_runtimes_compute_the_same_with_plain_operators(name, runtime, tmp_path):
    example, kinds = draw(*EXAMPLES[name]), [Way(4, 32, asymmetric=True), Way(8, channels=True), Way(3, 16), Way(4, 128)]
    network = side_by_side(example, kinds)
    write(network, tmp_path / "model.onnx", runtime)
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    assert not product_inputs(onnx.load(tmp_path / "model.onnx"))
    x = draw(7, *example.shape[1:], seed=4)
    x[0] = 0
    assert max(gaps(by_hand(network, x.numpy(), kinds), ds.open(tmp_path / "model.onnx", runtime=runtime or "onnxruntime")(x))) < 1e-5


def test_ties_are_decided_as_the_kernel_does(tmp_path):
    # The input is a row of the weight itself: codes of 4 bits, of which one lies half-way between two of 127.
    def build() -> nn.Module:
        return Net(lambda net, x: nn.functional.linear(net.t(x), net.t.weight), t=nn.Embedding(50, 96))

    for way in (Way(8, channels=True), Way(4, 32)):
        network = rounded(build, torch.randint(0, 50, (2, 7)), {"t.weight": way}, 32)
        write(network, tmp_path / "model.onnx", "onnxruntime")
        codes = [one for one in onnx.load(tmp_path / "model.onnx").graph.initializer if one.data_type == onnx.TensorProto.UINT8]
        assert [int(np.prod(one.dims)) for one in codes if np.prod(one.dims) >= 50 * 48] == [50 * 96 * way.bits // 8]  # one for table and layer
        index = torch.arange(50).reshape(5, 10)[:, :7]
        assert max(gaps([network.predict(index).numpy()], [ds.open(tmp_path / "model.onnx", runtime="onnxruntime")(index)])) < 1e-5 or not INTEGERS


@pytest.mark.parametrize("runtime", ["", "onnxruntime"])
def test_rows_with_what_is_no_number_give_none_and_others_are_as_ever(runtime, tmp_path):
    network = single(Way(4, 32), draw(2, 5, 96), 32)
    write(network, tmp_path / "model.onnx", runtime)
    session = ds.open(tmp_path / "model.onnx", runtime="onnxruntime")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = draw(2, 5, 96, seed=8)
        sound = torch.as_tensor(session(x))
        x[1, 2, 70] = bad
        for made in (torch.as_tensor(session(x)), network.predict(x)):
            assert not bool(made[1, 2].isfinite().any())
            made[1, 2] = sound[1, 2]
            assert torch.allclose(made, sound, rtol=1e-5, atol=1e-5)


def test_layers_that_share_an_input_share_what_is_made_of_it_and_odd_ones_round_alike(tmp_path):
    def build() -> nn.Module:
        parts = {"a": nn.Linear(64, 48), "b": nn.Linear(64, 48), "c": nn.Linear(48, 40), "d": nn.Linear(48, 16)}
        return Net(lambda net, x: (net.d(net.a(x) * net.b(x)), net.c(net.a(x)).relu()), **parts)

    # No kernel takes 3 bits, or groups of 24 columns; one rounds as the graph says only where the groups are the same.
    ways = {"a.weight": Way(4, 32), "b.weight": Way(4, 32, asymmetric=True), "c.weight": Way(3, 16), "d.weight": Way(4, 16)}
    network = rounded(build, draw(2, 64), ways, 32)
    write(network, tmp_path / "model.onnx", "onnxruntime")
    model = onnx.load(tmp_path / "model.onnx")
    nodes = [node.op_type for node in model.graph.node]
    assert len(product_inputs(model)) == 1 and nodes.count("MatMulNBits") == 2  # a is called twice, computed once
    assert nodes.count("ReduceMax") == 2 and nodes.count("MatMul") == 1 and nodes.count("Gemm") == 2
    lowered = network.fork()
    lower(lowered, "onnxruntime")
    x = draw(9, 64, seed=3)
    for one, two in zip(lowered.predict(x), network.predict(x), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)


# In the rest of the chain ---------------------------------------------------------------------------------------------------------


def test_networks_are_saved_settled_and_counted(tmp_path: Path):
    network = single(Way(4, 32), draw(2, 96), 32)
    loaded_equals_live(network, draw(2, 96))
    assert torch.equal(settle(network).predict(draw(2, 96)), network.predict(draw(2, 96)))
    assert count(network, draw(2, 96)).not_counted["fake_quantize_blocks"] == 1
    assert count(network, draw(2, 96)).macs == 2 * 96 * 33


@pytest.mark.parametrize("lie", [0, -32, "32", 2**70, 1.5])
def test_forged_blocks_are_refused(lie, tmp_path):
    single(Way(4, 32), draw(2, 96), 32).save(tmp_path / "true")
    record, tensors = forgery.read(tmp_path / "true")
    forgery.load(tmp_path / "same", record, tensors)
    forged = copy.deepcopy(record)
    forgery.node(forged, "downsize.fake_quantize_blocks.default")["args"][1] = lie
    forgery.refused(tmp_path / "forged", forged, tensors)


def test_huge_blocks_are_rows(tmp_path):
    x = draw(3, 50)
    assert torch.equal(fake_quantize_blocks(x, 2**40), fake_quantize_blocks(x, 50))
