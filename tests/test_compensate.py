"""Branches of low rank: against the closed form, in chains behind rounding and zeros, in files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from zoo import masked_tokens, specimen

from downsize.errors import SpecError, TaskError
from downsize.network.capture import capture
from downsize.network.judge import Judge
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.recipe import Recipe
from downsize.runtimes import open_artifact
from downsize.task import Task
from downsize.techniques import TECHNIQUES
from downsize.techniques.compensate import Compensate
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify

COARSE = Quantize(bits=2, ends=2, activations="none", rounding="nearest")


def mixed(samples: int, seed: int) -> torch.Tensor:
    """Inputs with a mean, of which some directions are large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.1, 2, 24)
    return torch.randn(samples, 24, generator=generator) @ mix + 1.5


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6)).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    first = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(16 * 6 * 6, 8)).eval()


def task_of(model: nn.Module, batches: list[torch.Tensor]) -> Task:
    return Task(model, batches[0][:2], {"calibrate": lambda: [(batch, None) for batch in batches]})


def dense_task() -> tuple[Task, Network]:
    model = perceptron()
    task = task_of(model, [mixed(64, seed) for seed in range(8)])
    return task, capture(model, task.example)


def image_task() -> tuple[Task, Network]:
    model = convolutions()
    images = [torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    task = task_of(model, images)
    return task, capture(model, task.example)


def error(one: Network, task: Task, inputs: torch.Tensor) -> float:
    wanted = task.model(inputs).detach()
    return float((one.predict(inputs).detach() - wanted).norm() / wanted.norm())


def test_a_branch_of_one_layer_is_the_best_of_its_rank_by_numpy():
    """Reduced-rank regression of what rounding took, on the samples themselves: least squares, then the singular vectors of its outputs."""
    torch.manual_seed(0)
    model = nn.Linear(24, 12).eval()
    batch = mixed(4000, 0)
    task = task_of(model, [batch])
    rounded = COARSE(capture(model, task.example), task)
    made = Compensate(rank=3, bits=32, samples=4000, holdout=100)(rounded, task)
    x = batch.double().numpy()
    missed = (model(batch) - rounded.predict(batch)).detach().double().numpy()
    centred, wanted = x - x.mean(0), missed - missed.mean(0)
    whole = centred @ np.linalg.lstsq(centred, wanted, rcond=None)[0]
    _, _, right = np.linalg.svd(whole, full_matrices=False)
    best = np.square(wanted - whole @ right[:3].T @ right[:3]).sum()
    left = (model(batch) - made.predict(batch)).detach().double().numpy()
    assert best < 0.9 * np.square(wanted).sum()
    # a part of the samples was held back, so that the fit is on nearly all of them
    assert np.square(left).sum() == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("kind", ["dense", "images"])
@pytest.mark.parametrize(
    "before", [COARSE, Quantize(bits=3, ends=3, activations="none", group=16, symmetric=False), Sparsify(sparsity=0.7, keep_ends=False)], ids=str
)
def test_rounded_and_sparse_networks_come_nearer_to_the_original(kind, before, tmp_path):
    task, network = dense_task() if kind == "dense" else image_task()
    fresh = mixed(64, 50) if kind == "dense" else torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(50))
    start = before(network, task)
    made = Compensate(rank=4)(start, task)
    assert error(made, task, fresh) < 0.99 * error(start, task, fresh)
    assert made.origin["compensated"]["layers"]
    loaded = Network.load(made.save(tmp_path / "made.net") or tmp_path / "made.net")
    assert torch.equal(loaded.predict(fresh), made.predict(fresh))
    write(made, tmp_path / "made.onnx")
    found = np.asarray(open_artifact(tmp_path / "made.onnx", "onnxruntime", 1)(fresh))
    np.testing.assert_allclose(found, made.predict(fresh).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_errors_fall_with_the_rank():
    task, network = dense_task()
    start, fresh = COARSE(network, task), mixed(256, 50)
    errors = [error(start, task, fresh), *(error(Compensate(rank=rank)(start, task), task, fresh) for rank in (1, 3, 5))]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_weights_of_branches_take_a_byte_where_others_are_rounded(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(256, 256).eval()
    task = task_of(model, [torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) for seed in range(8)])
    start = COARSE(capture(model, task.example), task)
    sizes = {}
    for bits in (None, 8, 32):
        write(Compensate(rank=16, bits=bits)(start, task), tmp_path / f"{bits}.onnx")
        sizes[bits] = (tmp_path / f"{bits}.onnx").stat().st_size
    assert sizes[None] == sizes[8] and sizes[32] - sizes[8] > 2.5 * 16 * (256 + 256)


def test_an_unchanged_network_gets_no_branch():
    task, network = dense_task()
    made = Compensate(rank=4)(network, task)
    assert not made.origin["compensated"]["layers"]
    assert torch.equal(made.predict(mixed(8, 3)), network.predict(mixed(8, 3)))


def test_a_transformer_with_few_bits_is_compensated_in_the_layers_asked_for():
    model, network = specimen("bert")
    batches = [masked_tokens(6) for _ in range(6)]
    task = Task(model, masked_tokens(2), {"calibrate": lambda: [(batch, None) for batch in batches]})
    start = Quantize(bits=2, activations="none", rounding="nearest")(network, task)
    made = Compensate(rank=4, layers=("*layer.1*", "*pooler*", "classifier*"))(start, task)
    added = {name.partition(".branch.")[0] for name, _ in made.named_tensors() if ".branch." in name}
    assert added and not any("layer.0" in name for name in added)
    judge = Judge(network, [network.flat(masked_tokens(6))])
    assert judge(made) < judge(start)


class Crossed(nn.Module):
    """Weights that are computed, and read in parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normed(self.attention(x, x[:, :2], x[:, :2], need_weights=False)[0])


def test_layers_whose_weights_were_computed_or_parted_are_compensated_too():
    batches = [mixed(64, seed).reshape(16, 4, 24) for seed in range(8)]
    task = task_of(Crossed().eval(), batches)
    network = capture(task.model, task.example)
    assert not Compensate(rank=4)(network, task).origin["compensated"]["layers"]
    start = COARSE(network, task)
    made = Compensate(rank=4)(start, task)
    assert len(made.origin["compensated"]["layers"]) == 5  # of queries, keys, values, outputs, and the normed one
    held = mixed(64, 9).reshape(16, 4, 24)
    assert error(made, task, held) < 0.9 * error(start, task, held)


def test_what_it_cannot_do_is_refused():
    task, network = dense_task()
    with pytest.raises(TaskError, match="quantized activations"):
        Compensate()(Quantize()(network, task), task)
    with pytest.raises(SpecError, match="nothere"):
        Compensate(layers=("nothere*",))(network, task)


def test_it_is_spelled_as_it_is_parsed():
    text = "quantize(bits=3, activations='none') | compensate(rank=16, layers=['encoder*'])"
    recipe = Recipe.parse(text, TECHNIQUES)
    assert recipe == Recipe.parse(str(recipe), TECHNIQUES) == Recipe.from_yaml(recipe.to_yaml(), TECHNIQUES)
