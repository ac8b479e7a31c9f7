"""The three models of the benchmark, each with calibration data, data to judge on, an input to time, and a tiny relative to warm up on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"
BATCH = 8
RESNET_CALIBRATION, RESNET_JUDGED = 64, 64  # images of noise
TOKENS = 128  # of the sentence that MiniLM is timed on
TINY_SAMPLES = 4

Batches = Callable[[], Iterable[tuple[Any, Any]]]


@dataclass
class Start:
    """What every method starts from: the torch model in evaluation mode, an example of its inputs, and calibration data.

    ``dimensions`` names the open dimensions of every input, by input name, in the order of the model's parameters. A method that goes on
    from a file may set ``model`` to None, so that its memory is freed.
    """

    model: nn.Module | None
    example: Any
    calibrate: Batches
    dimensions: dict[str, dict[int, str]]
    transformer: bool = False


@dataclass(frozen=True)
class Subject:
    """A model to compress. ``judged``: data by role; ``sample``: the one input that is timed; ``tiny``: a small model of the same kind.

    ``scores``: whether the outputs are class scores, else they are embeddings.
    """

    name: str
    start: Callable[[], Start]
    judged: dict[str, Batches]
    sample: Callable[[], Any]
    tiny: Callable[[], Start]
    scores: bool = True


@cache
def example(name: str) -> ModuleType:
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None  # always so for an existing .py file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def noise(count: int, size: int, seed: int, channels: int = 3) -> Iterator[tuple[torch.Tensor, None]]:
    """Batches of at most 8 images of standard normal noise, float32 [batch, channels, size, size], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, BATCH):
        yield torch.randn(min(BATCH, count - start), channels, size, size, generator=generator), None


# Convolutional networks -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of four stages; with widths 64 to 512 and two blocks a stage, ResNet-18 (11.7 M parameters at 1000 classes)."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512), blocks: int = 2, classes: int = 1000) -> None:
        super().__init__()
        stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(inputs, width, stride=2 if stage and not block else 1))
                inputs = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def settle(model: nn.Module, batches: Iterable[tuple[torch.Tensor, None]]) -> nn.Module:
    """The model in evaluation mode, its batch norms' statistics those of ``batches``, so that random weights give sound activations."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
    model.train()
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    return model.eval()


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights, the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def images(model: nn.Module, size: int, calibrate: Batches) -> Start:
    return Start(model, torch.zeros(1, 3, size, size), calibrate, {"pixels": {0: "batch"}})


def lite0() -> Start:
    photos = example("photos")
    return images(photos.load_model(), photos.SIZE, photos.calibrate)


def resnet18() -> Start:
    model = settle(seeded(ResNet), noise(32, 224, seed=1))
    return images(model, 224, lambda: noise(RESNET_CALIBRATION, 224, seed=2))


def tiny_network() -> Start:
    model = settle(seeded(lambda: ResNet((8, 8, 16, 16), blocks=1, classes=10)), noise(8, 64, seed=1))
    return images(model, 64, lambda: noise(TINY_SAMPLES, 64, seed=2))


# A transformer ----------------------------------------------------------------------------------------------------------------------


def text(model: nn.Module, inputs: Any, calibrate: Batches) -> Start:
    dimensions = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")}
    return Start(model, inputs, calibrate, dimensions, transformer=True)


def minilm() -> Start:
    sentences = example("sentences")
    return text(sentences.load_model(), sentences.encode(["An example of what is encoded."]), sentences.calibrate)


def tiny_encoder() -> Start:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = seeded(lambda: example("sentences").SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval())

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], None]]:
        for tokens in range(6, 6 + TINY_SAMPLES):
            yield {"input_ids": torch.arange(2 * tokens).reshape(2, tokens) % 64, "attention_mask": torch.ones(2, tokens, dtype=torch.int64)}, None

    return text(model, next(batches())[0], batches)


def long_sentence() -> dict[str, torch.Tensor]:
    sentences = example("sentences")
    return sentences.encode([" ".join(sentences.documentation()[:20])], TOKENS)


# All of them ------------------------------------------------------------------------------------------------------------------------

SUBJECTS = {
    "lite0": Subject(
        name="EfficientNet-Lite0",
        start=lite0,
        judged={"validate": lambda: example("photos").validate()},
        sample=lambda: next(example("photos").validate())[0][:1],
        tiny=tiny_network,
    ),
    "minilm": Subject(
        name="all-MiniLM-L6-v2",
        start=minilm,
        judged={"validate": lambda: example("sentences").validate(), "test": lambda: example("sentences").test()},
        sample=long_sentence,
        tiny=tiny_encoder,
        scores=False,
    ),
    "resnet18": Subject(
        name="ResNet-18",
        start=resnet18,
        judged={"noise": lambda: noise(RESNET_JUDGED, 224, seed=3)},
        sample=lambda: next(noise(1, 224, seed=4))[0],
        tiny=tiny_network,
    ),
}


# Calibration data on disk -----------------------------------------------------------------------------------------------------------


def store(batches: Iterable[tuple[Any, Any]], folder: Path) -> None:
    """Write the inputs of batches as files, so that every method reads the same, and reading costs next to nothing."""
    folder.mkdir(parents=True)
    for number, (inputs, _) in enumerate(batches):
        arrays = inputs if isinstance(inputs, dict) else {"": inputs}
        np.savez(folder / f"{number:05}.npz", **{f"input {name}": tensor.numpy() for name, tensor in arrays.items()})


def stored(folder: Path) -> Iterator[tuple[Any, None]]:
    """The batches that :func:`store` wrote, read one at a time."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name.removeprefix("input "): torch.from_numpy(file[name]) for name in file.files}
        yield arrays.get("", arrays), None
