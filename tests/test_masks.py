"""The zeros of a sparse network stay: through quantization, files, forks and training; and a revived one is found."""

from __future__ import annotations

import onnx
import pytest
import torch
from digits_task import batches, convolutional, digits, mlp, task_of
from forgery import read, write
from small_nets import Net, conv
from test_sparsify import grouped, net_task
from torch import nn

import downsize as ds
from downsize.errors import NetworkFileError
from downsize.network.onnx_file import write as write_onnx
from downsize.network.rewrite import set_constant
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import loaded_equals_live

FAST = ("equalized",)  # of what takes seconds each


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def assert_zeros_stay(before: ds.Network, after: ds.Network) -> None:
    """Every zero of a sparse tensor is zero in the network after, in the tensor and in what a quantizer makes of it."""
    masks = before.masks()
    assert masks
    for name, mask in masks.items():
        assert name in after.sparse and not bool(after.tensor(name)[~mask].any()), f"{name} has revived zeros"
    fakes = [node for node in after.graph.nodes if str(node.target).startswith("downsize.fake_quantize.") and node.args[0].op == "get_attr"]
    for fake in fakes:
        if fake.args[0].target in masks:
            tensors = [after.tensor(argument.target) for argument in fake.args[:3]]
            value = torch.ops.downsize.fake_quantize(*tensors, *fake.args[3:])
            assert not bool(value[~masks[fake.args[0].target]].any()), f"{fake.args[0].target} is quantized to other than zero"


def convolutions_in_a_row() -> nn.Module:
    """Layers that equalization balances, with channels so different that it pays."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.logspace(-1.5, 1.5, 8)[torch.randperm(8)][:, None, None, None])  # type: ignore[operator]
    return model.eval()


def outliers() -> nn.Module:
    """Linear layers whose inputs have channels so large that smoothing pays."""
    torch.manual_seed(0)
    scale = torch.ones(16)
    scale[3], scale[9] = 60.0, 30.0
    parts = {"one": nn.Linear(16, 16), "two": nn.Linear(16, 16), "three": nn.Linear(16, 4)}
    return Net(lambda net, x: net.three(torch.tanh(net.two(torch.tanh(net.one(x)) * net.scale))), scale=nn.Parameter(scale), **parts)


CHAINS = {
    "static": (lambda: convolutional(), digits()[0][:2], {}),
    "equalized": (convolutions_in_a_row, torch.randn(2, 3, 8, 8), {}),
    "smoothed": (outliers, torch.randn(2, 5, 16), {}),
    "perceptron": (lambda: mlp(), digits()[0][:2], {}),
    "grouped": (grouped, torch.randn(2, 3, 8, 8), {}),
    "nearest": (lambda: convolutional(), digits()[0][:2], {"rounding": "nearest"}),
    "weights": (lambda: convolutional(), digits()[0][:2], {"activations": "none"}),
    "dynamic": (lambda: mlp(), digits()[0][:2], {"activations": "dynamic"}),
}


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CHAINS])
def test_quantization_after_it_leaves_every_zero_a_zero(name, tmp_path):
    make, example, options = CHAINS[name]
    network, task = net_task(make(), example)
    sparse = Sparsify(sparsity=0.7, keep_ends=False)(network, task)
    quantized = Quantize(profile="x86", **options)(sparse, task)  # bytes, which are not packed
    assert_zeros_stay(sparse, quantized)
    loaded = loaded_equals_live(quantized, example, tmp_path)
    assert_zeros_stay(sparse, loaded)
    if name == "smoothed":
        assert any("smoothing" in other for other, _ in quantized.named_tensors())
    write_onnx(loaded, tmp_path / "int8.onnx")
    codes = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8]
    stored = sum(int((array == 0).sum()) for array in codes if array.ndim > 1)
    assert stored >= sum(int((~mask).sum()) for mask in sparse.masks().values())


def test_the_law_finds_a_revived_zero():
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    sparse = Sparsify(sparsity=0.7)(network, task)
    bad = sparse.fork()
    revive(bad, "3.weight")
    with pytest.raises(AssertionError, match=r"3.weight has revived"):
        assert_zeros_stay(sparse, bad)


@pytest.mark.slow
def test_sparsifying_again_revives_nothing():
    network, task = ds.capture(convolutional(), digits()[0][:2]), task_of(convolutional())
    first = Sparsify(sparsity=0.5, keep_ends=False)(network, task)
    for options in ({"sparsity": 0.8}, {"pattern": "2:4"}, {"sparsity": 0.8, "samples": 0}, {"sparsity": 0.2}):
        second = Sparsify(keep_ends=False, **options)(first, task)  # type: ignore[arg-type]
        for name, mask in first.masks().items():
            assert not bool(second.tensor(name)[~mask].any())
        assert all(second.sparse[name] <= first.sparse[name] for name in first.sparse)


def revive(network: ds.Network, name: str) -> None:
    node = next(node for node in network.graph.nodes if node.op == "get_attr" and node.target == name)
    tensor = network.tensor(name).detach().clone()
    tensor.view(-1)[int((tensor == 0).flatten().nonzero()[0])] = 0.5
    set_constant(network, node, tensor)


def test_a_revived_zero_is_found_by_every_check(tmp_path):
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    made = Sparsify(sparsity=0.7)(network, task)
    made.save(tmp_path / "sound")
    for other in (made.fork(), made.copy(), ds.Network.load(tmp_path / "sound")):
        assert other.sparse == made.sparse and torch.equal(other.masks()["3.weight"], made.masks()["3.weight"])
        other.check()
        revive(other, "3.weight")
        for refused in (other.check, other.fingerprint, lambda other=other: other.save(tmp_path / "bad")):
            with pytest.raises(NetworkFileError, match=r"'3.weight' has 4916 of 16384 .* at most 4915"):
                refused()
    made.check()
    assert not (tmp_path / "bad").exists()


def test_masks_are_part_of_the_fingerprint_and_of_the_file(tmp_path):
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    made = Sparsify(sparsity=0.7)(network, task)
    forgetful = made.fork()
    forgetful.sparse.clear()
    assert forgetful.fingerprint() != made.fingerprint() and forgetful.masks() == {}
    made.save(tmp_path / "sound")
    record, tensors = read(tmp_path / "sound")
    assert record["sparse"] == {"3.weight": 4915}
    for forged, message in (
        ({"3.weight": 4914}, "at most 4914"),
        ({"nothing": 5}, "'nothing' is not in the file"),
        ({"3.weight": "5"}, "valid integer"),
    ):
        write(tmp_path / "forged", {**record, "sparse": forged}, tensors)
        with pytest.raises(NetworkFileError, match=message):
            ds.Network.load(tmp_path / "forged")
    del record["sparse"]  # a file from before
    write(tmp_path / "old", record, tensors)
    assert ds.Network.load(tmp_path / "old").sparse == {}


def test_a_training_loop_keeps_the_zeros_with_the_masks():
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    made = Sparsify(sparsity=0.9, keep_ends=False)(network, task).copy()
    masks, optimizer = made.masks(), torch.optim.Adam(made.parameters(), lr=1e-3)
    for images, classes in batches(0, 1000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(images), classes).backward()
        optimizer.step()
    with pytest.raises(NetworkFileError, match="revived"):
        made.check()
    with torch.no_grad():
        for name, mask in masks.items():
            made.tensor(name).mul_(mask)
    made.check()
