"""A small language model whose table is its last layer, too (Press & Wolf, 2017), trained by words on the sentences of training_data.py."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_data import sentences

KEPT = Path(__file__).parent.parent / "runs" / "language"
WORDS, WIDTH, LENGTH = 4000, 128, 32
HELD, CALIBRATION = 400, 256  # windows
BATCH, STEPS, RATE = 32, 900, 2e-3

Batch = tuple[Tensor, Tensor]


class Language(nn.Module):
    """Two causal transformer layers over words: [batch, length] to [batch, length, 4000]; two thirds of its 781,000 parameters are the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.table.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers, self.norm = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.layers(self.table(words) + self.places[:length], mask=mask)
        return nn.functional.linear(self.norm(x), self.table.weight)


@cache
def windows() -> tuple[Tensor, Tensor]:
    """Windows of 33 words, to train on and held back, in an order drawn once and for all. Words that are not among the most frequent are 0."""
    text = re.findall(r"\w+|[^\w\s]", " \n ".join(sentences()).lower())
    numbers = {word: number + 1 for number, (word, _) in enumerate(Counter(text).most_common(WORDS - 1))}
    words = torch.tensor([numbers.get(word, 0) for word in text])
    rows = words[: len(words) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[HELD:], rows[:HELD]


class Training:
    """Shuffled batches of 32 windows, and the words that follow. Draws from torch's global generator."""

    def __len__(self) -> int:
        return len(windows()[0]) // BATCH

    def __iter__(self) -> Iterator[Batch]:
        rows = windows()[0]
        for order in torch.randperm(len(rows))[: len(self) * BATCH].split(BATCH):
            yield rows[order, :-1], rows[order, 1:]


def calibrate() -> Iterator[tuple[Tensor, None]]:
    """256 windows to train on."""
    for rows in windows()[0][:CALIBRATION, :-1].split(16):
        yield rows, None


def held() -> Iterator[Batch]:
    """The windows that were held back."""
    for rows in windows()[1].split(50):
        yield rows[:, :-1], rows[:, 1:]


def loss(outputs: Tensor, words: Tensor) -> Tensor:
    """Cross-entropy of the next word, in nats."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), words.flatten())


def mean_loss(predict: Callable[[Any], Any]) -> dict[str, float]:
    """Of the held-back windows."""
    return {"loss": sum(float(loss(torch.as_tensor(predict(words)), following)) * len(words) for words, following in held()) / HELD}


def trained(seed: int) -> nn.Module:
    """The model in evaluation mode, trained now or read from the file of an earlier training with the same code."""
    torch.manual_seed(seed)
    model = Language()
    settings = json.dumps([seed, STEPS, RATE, BATCH, inspect.getsource(train), inspect.getsource(Language)])
    file = KEPT / f"language-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        train(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()


def train(model: nn.Module) -> None:
    """AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    step = 0
    while step < STEPS:
        for words, following in Training():
            optimizer.zero_grad(set_to_none=True)
            loss(model(words), following).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step == STEPS:
                break
