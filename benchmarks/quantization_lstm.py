"""A character model (table, LSTM, linear head) on the texts of ``pydoc_data.topics``, trained here, and its files in int8 and 4 bits."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import pydoc_data.topics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantization_peers import KEPT, answering, saved_bytes
from quantization_peers import characters as peers
from rows import Quality, Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.progress import Progress
from downsize.runtimes import open_artifact
from downsize.task import Task
from downsize.techniques.quantize import Quantize

FEATURES, WIDTH = 64, 256
LENGTH, BATCH, STEPS, RATE = 128, 32, 400, 6e-3
HELD_EVERY = 10  # topics
RUNS = 50  # of one window, of which the shortest time is taken: other work on the machine only adds to it


@cache
def texts() -> tuple[Tensor, Tensor, int]:
    """Characters as numbers: of the topics to train on, of every tenth topic, which is judged on; how many characters there are."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    known = {character: number for number, character in enumerate(sorted(set("".join(topics))))}
    held = [topic for number, topic in enumerate(topics) if number % HELD_EVERY == 0]
    train = [topic for number, topic in enumerate(topics) if number % HELD_EVERY]
    return *(torch.tensor([known[character] for character in "\n".join(part)]) for part in (train, held)), len(known)  # type: ignore[return-value]


class Characters(nn.Module):
    """Logits of the next character: [batch, time] to [batch, time, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(characters, FEATURES), nn.LSTM(FEATURES, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(x))[0])


def trained(seed: int) -> nn.Module:
    """The model in evaluation mode, trained now or read from the file of an earlier training with the same settings."""
    torch.manual_seed(seed)
    model = Characters(texts()[2])
    settings = json.dumps([seed, LENGTH, BATCH, STEPS, RATE, len(texts()[0]), inspect.getsource(train), repr(model)])
    file = KEPT / f"characters-{seed}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        train(model, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()


def train(model: nn.Module, seed: int) -> None:
    """Cross-entropy by Adam on random windows, one cycle of the rate."""
    generator, data = torch.Generator().manual_seed(seed), texts()[0]
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        starts = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=generator)
        windows = torch.stack([data[start : start + LENGTH + 1] for start in starts.tolist()])
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def windows_of(data: Tensor) -> Tensor:
    """The text in windows that follow one another, each with the character behind it: [windows, LENGTH + 1]."""
    return data.unfold(0, LENGTH + 1, LENGTH)


def calibration() -> Iterator[tuple[Tensor, None]]:
    """128 windows of the text to train on, spread evenly."""
    windows = windows_of(texts()[0])
    for part in windows[:: len(windows) // 128][:128].split(BATCH):
        yield part[:, :-1].contiguous(), None


def judge(made: Any) -> Quality:
    """Bits a character on the held-out topics, each window from an empty state; bytes; the least milliseconds for one window on one thread."""
    if isinstance(made, Network):
        with tempfile.TemporaryDirectory() as folder:
            write(made, Path(folder, "model.onnx"), "onnxruntime")
            return judge(Path(folder, "model.onnx"))
    module = isinstance(made, nn.Module)
    predict, size = (answering(made), saved_bytes(made)) if module else (open_artifact(made, "onnxruntime", 1), made.stat().st_size)
    loss, count = 0.0, 0
    for part in windows_of(texts()[1]).split(BATCH):
        logits = torch.from_numpy(np.asarray(predict(part[:, :-1].contiguous()))).double()
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
    one, times = windows_of(texts()[1])[:1, :-1].contiguous(), []
    for _ in range(RUNS):
        began = time.perf_counter()
        predict(one)
        times.append(1e3 * (time.perf_counter() - began))
    return {"bits a character": loss / count / math.log(2), "kB": size / 1e3, "ms": min(times)}


def characters(seed: int) -> Iterator[Row]:
    """A character model of one LSTM layer on the texts of ``pydoc_data.topics``, judged on every tenth topic."""
    model = trained(seed)
    example = torch.zeros(2, LENGTH, dtype=torch.int64)
    task, original = Task(model, example, {"calibrate": calibration}, progress=Progress()), capture(model, example)
    yield Row("float", lambda: original, judge)
    for name, technique in {
        "int8, dynamic": Quantize(activations="dynamic"),
        "int8, weights alone": Quantize(activations="none"),
        "4 bits, weights alone": Quantize(bits=4, group=32, symmetric=False, activations="none", samples=128),
    }.items():
        yield Row(name, lambda technique=technique: technique(original, task), judge)
    yield Row("onnxruntime.quantization: dynamic", lambda: onnxruntime_dynamic(original, False), judge)
    yield Row("onnxruntime.quantization: dynamic, a scale a row", lambda: onnxruntime_dynamic(original, True), judge)
    yield from peers(model, judge)


def onnxruntime_dynamic(original: Network, rows: bool) -> Path:
    """``quantize_dynamic`` on the float file of downsize, its constants folded before by ONNX Runtime, as that tool needs them."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    KEPT.mkdir(parents=True, exist_ok=True)
    plain, folded, file = (KEPT / f"characters-{name}.onnx" for name in ("float", "folded", f"onnxruntime-{'rows' if rows else 'all'}"))
    write(original, plain)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    quantize_dynamic(folded, file, weight_type=QuantType.QInt8, per_channel=rows)
    return file


CASES = {"characters": characters}
