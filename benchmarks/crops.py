"""Varied crops of few photos: what a pruned classifier is fitted on when there are no labels and only some 20 photos.

With so little data generalisation is the limit, not algebra, so every crop is changed at random: scale, aspect, mirroring, rotation by
90 degrees, brightness, contrast, saturation and hue, blur, noise, and mixing of two crops, as a blend (Zhang et al., mixup, 2018) or by
a rectangle of one in the other (Yun et al., CutMix, 2019). The n-th crop is the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from models import BATCH, example
from PIL import Image, ImageEnhance, ImageFilter

AREA, ASPECT = (0.06, 1.0), (3 / 5, 5 / 3)  # of a crop: share of the photo, width to height
ROTATED, COLOURED, BLURRED, NOISY, BLENDED, PASTED = 0.25, 0.8, 0.2, 0.1, 0.2, 0.2  # how often
STRENGTH, HUE = 0.4, 0.1  # of brightness, contrast and saturation, as a factor's distance from 1; of hue, as a share of the colour circle
BLUR, NOISE = (0.3, 1.8), 0.04  # standard deviations: in pixels, and as a share of white
SMALLER = 3  # photos are kept this many times as large as the model's input, which every crop is larger than


def augmented(count: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, None]]:
    """Batches of at most 8 changed crops of scikit-image's photos, float32 [batch, 3, 224, 224], normalised for EfficientNet-Lite0."""
    photos = example("photos")
    paths = photos.calibration_photos()
    for start in range(0, count, BATCH):
        crops = [crop(paths, number, seed) for number in range(start, min(start + BATCH, count))]
        values = (np.stack(crops) - photos.MEAN) / photos.DEVIATION
        yield torch.from_numpy(np.ascontiguousarray(values.astype(np.float32).transpose(0, 3, 1, 2))), None


def crop(paths: Sequence[Path], number: int, seed: int) -> np.ndarray:
    """The ``number``-th crop, at times mixed with one of another photo: float64 [224, 224, 3] between 0 and 1; the photos come in turn."""
    generator = np.random.default_rng([seed, number])
    one = changed(paths[number % len(paths)], generator)
    kind = generator.random()
    if kind >= BLENDED + PASTED:
        return one
    other = changed(paths[int(generator.integers(len(paths)))], generator)
    if kind < BLENDED:
        return one + generator.uniform(0.2, 0.5) * (other - one)
    size = example("photos").SIZE
    height, width = generator.integers(size // 4, 3 * size // 4, 2)
    top, left = generator.integers(0, size - height), generator.integers(0, size - width)
    one[top : top + height, left : left + width] = other[top : top + height, left : left + width]
    return one


def changed(path: Path, generator: np.random.Generator) -> np.ndarray:
    """A random crop of the photo with its geometry, colours and sharpness changed: float64 [224, 224, 3] between 0 and 1."""
    image = box(photo(path), generator)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if generator.random() < ROTATED:
        turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        image = image.transpose(turns[int(generator.integers(3))])
    if generator.random() < COLOURED:
        image = recoloured(image, generator)
    if generator.random() < BLURRED:
        image = image.filter(ImageFilter.GaussianBlur(generator.uniform(*BLUR)))
    values = np.asarray(image, np.float64) / 255
    if generator.random() < NOISY:
        values = (values + NOISE * generator.standard_normal(values.shape)).clip(0, 1)
    return values


@cache
def photo(path: Path) -> Image.Image:
    """A photo, made smaller if it is large, so that reading many crops of it is fast."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    side = SMALLER * example("photos").SIZE
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return image


def box(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random part of the image, scaled to the model's input, bicubic."""
    area, aspect = math.exp(generator.uniform(*np.log(AREA))), math.exp(generator.uniform(*np.log(ASPECT)))
    pixels = area * image.width * image.height
    width, height = min(float(image.width), math.sqrt(pixels * aspect)), min(float(image.height), math.sqrt(pixels / aspect))
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
    size = example("photos").SIZE
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def recoloured(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue changed, in random order."""
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for kind in generator.permutation(len(kinds)):
        image = kinds[kind](image).enhance(generator.uniform(1 - STRENGTH, 1 + STRENGTH))
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int64) + round(255 * generator.uniform(-HUE, HUE))) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
