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
LOADED = 8  # batches of sentences whose members are sorted by length together

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

    def __iter__(self) -> Iterator[Batch]:
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


def sentence_batches() -> Iterator[tuple[dict[str, torch.Tensor], None]]:
    """Shuffled batches of 64 sentences of about equal length; an epoch takes each once. Draws from torch's global generator."""
    encode, known = example("sentences").encode, sentences()
    order = torch.randperm(len(known)).tolist()
    for start in range(0, len(order) - SENTENCES * LOADED + 1, SENTENCES * LOADED):
        some = sorted((known[i] for i in order[start : start + SENTENCES * LOADED]), key=len)
        for number in torch.randperm(LOADED).tolist():
            yield encode(some[number * SENTENCES : (number + 1) * SENTENCES]), None


def crop_batches(steps: int, seed: int = 1) -> Iterator[tuple[torch.Tensor, None]]:
    """So many batches of 16 changed crops of scikit-image's photos, none twice."""
    eights = crops.augmented(CROPS * steps, seed)
    for one in eights:
        other = next(eights, None)
        yield torch.cat([part[0] for part in chain([one], [other] if other else [])]), None
