"""Fashion-MNIST (Xiao et al., 2017) from its Debian package, and two classifiers trained on it: LeNet-300-100 and a small ResNet.

    apt-get install dataset-fashion-mnist

The trained weights are kept under runs/fashion/, so that training, which takes some minutes, happens once.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from models import Block, seeded
from safetensors.torch import load_file, save_file
from torch import nn

from downsize.errors import TaskError

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
WEIGHTS = Path(__file__).parent.parent / "runs" / "fashion"
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels, as fractions of white
CLASSES = 10
CALIBRATION = 1024  # images
TRAIN_BATCH, BATCH = 128, 64

Batch = tuple[torch.Tensor, torch.Tensor | None]


# The data ---------------------------------------------------------------------------------------------------------------------------


def read_idx(file: Path) -> np.ndarray:
    """The array in a gzipped idx file of unsigned bytes: four bytes 0, 0, 8, rank; the sizes, 32 bits each, big-endian; the values.

    Raises:
        TaskError: the file is missing or is no such file.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise TaskError(f"{file} is missing; this benchmark needs it: apt-get install dataset-fashion-mnist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{file} cannot be unpacked: {error}") from None
    rank = content[3] if len(content) > 3 else 0
    begin = 4 + 4 * rank
    if content[:3] != b"\x00\x00\x08" or len(content) < begin:
        raise TaskError(f"{file} begins with {content[:4].hex()}; expected 000008 and the rank: an idx file of unsigned bytes.")
    shape = struct.unpack(f">{rank}I", content[4:begin])
    if len(content) - begin != math.prod(shape):
        raise TaskError(f"{file} holds {len(content) - begin} values; expected {math.prod(shape)}, for the shape {list(shape)}.")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


@cache
def images(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of "train" (60,000) or "t10k" (10,000), normalised float32 [images, 1, 28, 28], and their classes int64 [images]."""
    pixels, labels = (read_idx(FOLDER / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    normal = (torch.from_numpy(pixels.astype(np.float32)) / 255 - MEAN) / DEVIATION
    return normal[:, None], torch.from_numpy(labels.astype(np.int64))


def batches(inputs: torch.Tensor, classes: torch.Tensor | None) -> Iterator[Batch]:
    for start in range(0, len(inputs), BATCH):
        part = slice(start, start + BATCH)
        yield inputs[part], None if classes is None else classes[part]


def calibrate() -> Iterator[Batch]:
    """1,024 training images, drawn once and for all, without their classes."""
    inputs, _ = images("train")
    return batches(inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:CALIBRATION]], None)


def test() -> Iterator[Batch]:
    """The 10,000 test images with their classes."""
    return batches(*images("t10k"))


# The models -------------------------------------------------------------------------------------------------------------------------


class LeNet(nn.Sequential):
    """784-300-100-10 (LeCun et al., 1998): 266,610 parameters."""

    def __init__(self) -> None:
        hidden = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(100, CLASSES))


class SmallResNet(nn.Module):
    """Three stages of one residual block each on 28 x 28, 14 x 14 and 7 x 7 positions (He et al., 2016)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.stages = nn.Sequential(*(Block(inputs, width, 2 if number else 1) for number, (inputs, width) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def lenet() -> nn.Module:
    return trained(LeNet, epochs=3, rate=0.05, threads=1)


def small_resnet() -> nn.Module:
    return trained(SmallResNet, epochs=4, rate=0.2, threads=1)


# Training ---------------------------------------------------------------------------------------------------------------------------


def trained(build: Callable[[], nn.Module], epochs: int, rate: float, threads: int) -> nn.Module:
    """The model in evaluation mode, trained now or read from the file of an earlier training with the same code and settings."""
    model = seeded(build)
    settings = json.dumps([epochs, rate, inspect.getsource(train), repr(model)])
    file = WEIGHTS / f"{build.__name__.lower()}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # sums in another order give other weights
        train(model, epochs, rate)
        torch.set_num_threads(before)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, draft)
        draft.rename(file)
    model.load_state_dict(load_file(file))
    return model.eval()


def train(model: nn.Module, epochs: int, rate: float) -> None:
    """Cross-entropy by SGD with momentum, one cycle of the learning rate, images mirrored at random; the same for the same seed."""
    inputs, classes = images("train")
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(inputs) // TRAIN_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(order) - TRAIN_BATCH + 1, TRAIN_BATCH):
            rows = order[start : start + TRAIN_BATCH]
            mirrored = torch.rand(TRAIN_BATCH, 1, 1, 1, generator=generator) < 0.5
            some = torch.where(mirrored, inputs[rows].flip(3), inputs[rows])
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(some), classes[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module) -> float:
    """The share of the test images that the model puts into the right class."""
    with torch.no_grad():
        right = sum(int((model(inputs).argmax(1) == classes).sum()) for inputs, classes in test() if classes is not None)
    return right / len(images("t10k")[1])
