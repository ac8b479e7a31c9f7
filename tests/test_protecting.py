"""Weights protected before rounding: what the network computes stays, rounding errs less, and where the factors go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from downsize.errors import SpecError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import aten
from downsize.network.statistics import Pieces
from downsize.quantization.formats import Format
from downsize.quantization.protecting import protect
from downsize.runtimes import open_artifact
from downsize.task import Task
from downsize.techniques.quantize import Quantize

FORMAT = Format(3, 16, symmetric=False)


class Block(nn.Module):
    """Two layers on a norm of their own, one on a sum that the output reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.left, self.right, self.down = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = torch.tanh(self.left(y)) + self.right(y)
        return x + self.down(z) + torch.nn.functional.pad(z, (0, 8))


def block(outliers: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        if outliers:
            model.norm.weight[:3] = 12.0
            model.right.weight[:3] *= 15.0
    return model


def data(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 32, generator=generator) for _ in range(8)]


def task_of(model: nn.Module) -> Task:
    return Task(model, data()[0][:2], {"calibrate": lambda: [(batch, None) for batch in data()]})


def error(network: Network, model: nn.Module) -> float:
    fresh = torch.cat(data(9))
    wanted = model(fresh).detach()
    return float((network.predict(fresh).detach() - wanted).norm() / wanted.norm())


def test_the_function_stays_and_a_norm_of_their_own_takes_the_factor():
    model = block()
    network = capture(model, data()[0])
    made = network.fork().eval()
    formats = {f"{name}.weight": FORMAT for name in ("left", "right", "down")}
    pieces = Pieces.of(network, ((batch, None) for batch in data()), 128)
    assert protect(made, formats, pieces) == 2
    assert error(made, model) < 1e-5
    products = [node for node in made.graph.nodes if node.target is aten.mul.Tensor]
    assert len(products) == 1  # before "down", whose input the output reads too; the norm has the other factor in its gain
    factor = made.tensor("norm.weight") / network.tensor("norm.weight")
    assert torch.allclose(made.tensor("left.weight") * factor, network.tensor("left.weight"), atol=1e-6)
    assert float(factor[:3].detach().max()) < float(factor[3:].detach().min())  # the inputs that are large are scaled down


@pytest.mark.parametrize("group", [None, 16])
def test_large_inputs_cost_less_than_rounding_to_nearest(group, tmp_path):
    model = block()
    task = task_of(model)
    network = capture(model, task.example)
    fields = {"bits": 3, "ends": 3, "group": group, "symmetric": False, "activations": "none"}
    plain, protected = (Quantize(**fields, rounding=rounding)(network, task) for rounding in ("nearest", "awq"))
    assert error(protected, model) < 0.95 * error(plain, model)
    write(protected, tmp_path / "made.onnx")
    fresh = torch.cat(data(9))
    found = torch.as_tensor(open_artifact(tmp_path / "made.onnx", "onnxruntime", 1)(fresh))
    assert float((found - protected.predict(fresh).detach()).abs().max()) < 1e-4 * float(found.abs().max())


def test_it_never_chooses_worse_than_nearest_and_leaves_what_has_no_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    images = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    task = Task(model, images[0][:2], {"calibrate": lambda: [(batch, None) for batch in images]})
    network = capture(model, task.example)
    plain, same = (Quantize(bits=3, ends=3, activations="none", rounding=rounding)(network, task) for rounding in ("nearest", "awq"))
    assert torch.equal(plain.predict(images[0]), same.predict(images[0]))


def test_it_is_for_weights_alone():
    with pytest.raises(SpecError, match="rounding='awq' is for weights alone"):
        Quantize(bits=4, rounding="awq")
