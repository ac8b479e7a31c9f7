"""Training on Fashion-MNIST: fine-tuned and distilled halves, small students, few bits, few weights. Three seeds; test images are used once."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fashion
import torch
from rows import Row, measured
from safetensors.torch import load_file, save_file
from torch import nn
from training_data import FashionTraining, fashion_calibration, fashion_validation

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.progress import Progress
from downsize.scores import top1
from downsize.task import Task
from downsize.techniques.distill import Distill
from downsize.techniques.factorize import Factorize
from downsize.techniques.finetune import Finetune
from downsize.techniques.prune import Prune
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.training.plan import Training

KEPT = Path(__file__).parent.parent / "runs" / "training"
EXAMPLE = torch.zeros(2, 1, 28, 28)
RESNET_EPOCHS, LENET5_EPOCHS, LENET_EPOCHS = 12, 4, 8


class LeNet5(nn.Sequential):
    """32C5-MP2-64C5-MP2-512-10, as networks of few bits are compared on (Louizos et al., 2019), with batch norms."""

    def __init__(self) -> None:
        first = [nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        super().__init__(*first, *second, nn.Linear(1024, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, fashion.CLASSES))


def half_resnet() -> nn.Module:
    """The small ResNet at half the width: a quarter of parameters and MACs."""
    return fashion.SmallResNet((8, 16, 32))


# Dense networks ----------------------------------------------------------------------------------------------------------------------


def dense(build: Callable[[], nn.Module], seed: int, epochs: int, rate: float) -> nn.Module:
    """The trained float network in evaluation mode, trained now or read from the file of an earlier training with the same settings."""
    torch.manual_seed(seed)
    model = build()
    settings = json.dumps([seed, epochs, rate, inspect.getsource(train_dense), repr(model)])
    file = KEPT / f"{build.__name__.lower()}-{seed}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        train_dense(model, seed, epochs, rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()


def train_dense(model: nn.Module, seed: int, epochs: int, rate: float) -> None:
    """Cross-entropy by SGD with momentum on the 55,000 images, one cycle of the learning rate."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    data = FashionTraining()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(data), pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for inputs, classes in data:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(inputs), classes).backward()
            optimizer.step()
            schedule.step()


def task_of(model: nn.Module, **models: nn.Module) -> Task:
    data = {"calibrate": fashion_calibration, "train": FashionTraining, "validate": fashion_validation}
    return Task(model, EXAMPLE, data, top1, models=models, checkpoints=KEPT / "checkpoints", progress=Progress())


def score(network: Network) -> dict[str, float]:
    """Of the written file, in its runtime, on the test images."""
    return measured(network, EXAMPLE[:1], lambda predict: {"top-1": 100 * top1(predict, fashion.test())})


# Cases -------------------------------------------------------------------------------------------------------------------------------


def resnet(seed: int) -> Iterator[Row]:
    """Half the MACs of a small ResNet, with and without a teacher, the same budget."""
    model = dense(fashion.SmallResNet, seed, RESNET_EPOCHS, 0.2)
    task, start = task_of(model), capture(model, EXAMPLE)
    yield Row("dense", lambda: start, score)
    pruned = Prune(macs=0.5, fold=False, samples=fashion.CALIBRATION)(start, task)
    yield Row("half the MACs, not trained", lambda: pruned, score)
    plan: dict[str, Any] = {"epochs": 4, "rate": 0.1, "optimizer": "sgd", "decay": 5e-4, "warmup": 0.1}
    yield Row("control: fine-tuned without a teacher", lambda: Finetune(**plan)(pruned, task), score)
    yield Row("distilled from the dense one", lambda: Distill(**plan, outputs="logits", temperature=4.0, weight=0.9)(pruned, task), score)
    # Not clipped, as below: the control, too.
    free: dict[str, Any] = plan | {"clip": None}
    standardized: dict[str, Any] = {"outputs": "standardized", "temperature": 2.0, "weight": 0.9}
    yield Row("distilled, standardized logits, gradients not clipped", lambda: Distill(**free, **standardized)(pruned, task), score)
    yield Row("control, gradients not clipped", lambda: Finetune(**free)(pruned, task), score)
    # Nearer to the dense network, and taught by it alone, slowly and with the statistics it was fitted with.
    first = Prune(macs=0.8, fold=False, samples=fashion.CALIBRATION)(start, task)
    factored = Factorize(macs=0.5 / 0.8, fold=False, samples=fashion.CALIBRATION)(first, task)
    yield Row("pruned to 0.8, factored to half", lambda: factored, score)
    slow: dict[str, Any] = {"epochs": 4, "rate": 3e-3, "optimizer": "sgd", "warmup": 0.1, "norms": "freeze"}
    yield Row("the same, control: fine-tuned without a teacher", lambda: Finetune(**slow)(factored, task), score)
    yield Row(
        "the same, taught by the dense one alone", lambda: Distill(**slow, outputs="logits", temperature=2.0, weight=1.0)(factored, task), score
    )


def student(seed: int) -> Iterator[Row]:
    """A student a quarter as large as the small ResNet, from random weights."""
    model = dense(fashion.SmallResNet, seed, RESNET_EPOCHS, 0.2)
    torch.manual_seed(100 + seed)
    small = half_resnet().eval()
    task = task_of(model, small=small)
    # Not clipped: the teacher's loss counts T^2 times, so that clipping would slow it down, and not the control.
    plan: dict[str, Any] = {"epochs": 5, "rate": 0.2, "optimizer": "sgd", "decay": 5e-4, "warmup": 0.2, "clip": None, "student": "small"}
    start = capture(model, EXAMPLE)
    yield Row("teacher", lambda: start, score)
    yield Row("control: student without a teacher", lambda: Distill(**plan, weight=0.0)(start, task), score)
    logits: dict[str, Any] = {"outputs": "logits", "temperature": 4.0, "weight": 0.9}
    yield Row("student, logits", lambda: Distill(**plan, **logits)(start, task), score)
    standardized: dict[str, Any] = {"outputs": "standardized", "temperature": 2.0, "weight": 0.9}
    yield Row("student, standardized logits", lambda: Distill(**plan, **standardized)(start, task), score)
    inner: dict[str, Any] = {"features": "similarity", "feature_weight": 0.3}
    yield Row("student, standardized logits and similarities inside", lambda: Distill(**plan, **standardized, **inner)(start, task), score)


def lenet5(seed: int) -> Iterator[Row]:
    """Few bits: after training, and trained as they compute; first and last layer at 8 bits."""
    model = dense(LeNet5, seed, LENET5_EPOCHS, 0.1)
    task, start = task_of(model), capture(model, EXAMPLE)
    yield Row("float", lambda: start, score)
    plan = Distill(epochs=3, rate=1e-3, outputs="logits", temperature=4.0, weight=0.7)
    for name, fields in {
        "4/4 bits": {"bits": 4, "activation_bits": 4},
        "2/2 bits": {"bits": 2, "activation_bits": 2},
        "ternary weights": {"levels": "twn", "activations": "none"},
        "binary weights": {"levels": "xnor", "activations": "none"},
    }.items():
        yield Row(f"{name}, after training", lambda fields=fields: Quantize(**fields)(start, task), score)
        yield Row(f"{name}, trained", lambda fields=fields: Quantize(**fields, train=plan)(start, task), score)


def gradual(seed: int) -> Iterator[Row]:
    """LeNet-300-100 with few weights."""
    model = dense(fashion.LeNet, seed, LENET_EPOCHS, 0.05)
    task, start = task_of(model), capture(model, EXAMPLE)
    yield Row("dense", lambda: start, score)
    plan: Training = Distill(epochs=15, rate=2e-3, outputs="logits", temperature=2.0, weight=0.7)
    for sparsity in (0.95, 0.98):
        name = f"{100 * sparsity:.0f} % zeros"
        yield Row(f"{name}, after training", lambda sparsity=sparsity: Sparsify(sparsity=sparsity, keep_ends=False)(start, task), score)
        yield Row(f"{name}, trained", lambda sparsity=sparsity: Sparsify(sparsity=sparsity, keep_ends=False, train=plan)(start, task), score)


CASES = {"resnet": resnet, "student": student, "lenet5": lenet5, "gradual": gradual}
