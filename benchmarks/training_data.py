"""Data to train on: Fashion-MNIST with a validation part, sentences of many domains, endless changed crops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain

import crops
import fashion
import texts
import torch
from models import example

VALIDATION = 5000  # of the 60,000 training images
SENTENCES = 64  # a batch
CROPS = 16  # a batch
GRAIN, LONGEST = 8, 64  # tokens

Batch = tuple[torch.Tensor, torch.Tensor | None]


@cache
def parts() -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of the training images: 55,000 to train on, 5,000 to validate; drawn once and for all."""
    order = torch.randperm(60000, generator=torch.Generator().manual_seed(0))
    return order[VALIDATION:], order[:VALIDATION]


class FashionTraining:
    """Shuffled batches of 128 of the 55,000 images, mirrored at random. Draws from torch's global generator."""

    def __len__(self) -> int:
        return len(parts()[0]) // fashion.TRAIN_BATCH

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        inputs, classes = fashion.images("train")
        rows = parts()[0]
        order = rows[torch.randperm(len(rows))]
        for start in range(0, len(self) * fashion.TRAIN_BATCH, fashion.TRAIN_BATCH):
            some = order[start : start + fashion.TRAIN_BATCH]
            mirrored = torch.rand(len(some), 1, 1, 1) < 0.5
            yield torch.where(mirrored, inputs[some].flip(3), inputs[some]), classes[some]


def fashion_validation() -> Iterator[Batch]:
    """The 5,000 images."""
    inputs, classes = fashion.images("train")
    return fashion.batches(inputs[parts()[1]], classes[parts()[1]])


def fashion_calibration() -> Iterator[Batch]:
    """1,024 of the images to train on, without classes."""
    inputs, _ = fashion.images("train")
    return fashion.batches(inputs[parts()[0][: fashion.CALIBRATION]], None)


@cache
def sentences() -> list[str]:
    """All sentences there are to distil on: Python's language reference without those judged on, and docstrings of torch, numpy and scipy."""
    judged = set(texts.held())
    reference = [sentence for sentence in example("sentences").documentation()[: -texts.HELD] if sentence not in judged]
    return [*reference, *(sentence for sentence in texts.docstrings() if sentence not in judged)]


@cache
def encoded() -> dict[int, dict[str, torch.Tensor]]:
    """All sentences of at most 64 tokens as the model takes them, by length: each is padded to the next multiple of 8 tokens, always to the same
    one, so that what the teacher says of it is known after the first time."""
    encode, found = example("sentences").encode, dict[int, list[dict[str, torch.Tensor]]]()
    for sentence in sentences():
        one = encode([sentence])
        length = -(-one["input_ids"].shape[1] // GRAIN) * GRAIN
        if length <= LONGEST:
            padded = {name: torch.nn.functional.pad(value, (0, length - value.shape[1])) for name, value in one.items()}
            found.setdefault(length, []).append(padded)
    return {length: {name: torch.cat([row[name] for row in rows]) for name in rows[0]} for length, rows in found.items()}


def sentence_batches() -> Iterator[tuple[dict[str, torch.Tensor], None]]:
    """Shuffled batches of 64 sentences of about equal length. Draws from torch's global generator."""
    places = []
    for length, rows in encoded().items():
        order = torch.randperm(len(rows["input_ids"]))
        places += [(length, order[start : start + SENTENCES]) for start in range(0, len(order) - SENTENCES + 1, SENTENCES)]
    for number in torch.randperm(len(places)).tolist():
        length, chosen = places[number]
        yield {name: values[chosen] for name, values in encoded()[length].items()}, None


def crop_batches(steps: int, seed: int = 1) -> Iterator[tuple[torch.Tensor, None]]:
    """So many batches of 16 changed crops of scikit-image's photos, none twice."""
    eights = crops.augmented(CROPS * steps, seed)
    for one in eights:
        other = next(eights, None)
        yield torch.cat([part[0] for part in chain([one], [other] if other else [])]), None
