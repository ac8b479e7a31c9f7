"""Quantization of real models: all-MiniLM-L6-v2 and EfficientNet-Lite0, beside what other tools make of the same float file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import quantization_peers
from pruning_models import SUBJECTS, Subject
from quantization_peers import answering, saved_bytes
from rows import Quality, Row
from torch import nn
from training_data import sentence_batches
from training_real import quality_of

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.progress import Progress
from downsize.runtimes import open_artifact
from downsize.task import Task
from downsize.techniques.quantize import Quantize

SAMPLES = 400  # of the calibration sentences or crops, for ranges of activations
STEPS = 400  # of reconstruction, of each part


def task_of(subject: Subject) -> Task:
    start = subject.start()
    assert start.model is not None
    return Task(start.model, start.example, {"calibrate": start.calibrate, "train": sentence_batches}, progress=Progress())


def judge_of(task: Task, subject: Subject) -> Callable[[Any], Quality]:
    """The subject's figures of a written file, or of a network that is written first, in ONNX Runtime, or of a module in torch; with its bytes."""

    def judge(made: Any) -> Quality:
        if isinstance(made, Network):
            with tempfile.TemporaryDirectory() as folder:
                write(made, Path(folder, "model.onnx"))
                return judge(Path(folder, "model.onnx"))
        if isinstance(made, nn.Module):
            return {"MB": saved_bytes(made) / 1e6} | quality_of(answering(made), task, subject)
        return {"MB": made.stat().st_size / 1e6} | quality_of(open_artifact(made, "onnxruntime", 1), task, subject)

    return judge


def minilm(seed: int) -> Iterator[Row]:
    """all-MiniLM-L6-v2: the whole file, judged on held-back sentences, and on licences and package descriptions, which nothing was fitted on."""
    subject = SUBJECTS["minilm"]
    task = task_of(subject)
    judge, original = judge_of(task, subject), capture(task.model, task.example, more=task.variations())
    yield Row("float", lambda: original, judge)
    alone: dict[str, Any] = {"activations": "none", "symmetric": False}
    in_blocks: dict[str, Any] = alone | {"activations": "dynamic"}
    for name, technique in {
        "4 bits, a scale for 128 columns": Quantize(bits=4, tables=4, group=128, **alone, samples=subject.samples),
        "4 bits, tables in 3, a scale for 64 columns": Quantize(bits=4, tables=3, group=64, **alone, samples=subject.samples),
        "4 bits, a scale for 32 columns": Quantize(bits=4, tables=4, group=32, **alone, samples=subject.samples),
        "4 bits, a scale for 32 columns, to nearest": Quantize(bits=4, tables=4, group=32, **alone, rounding="nearest"),
        "4 bits, a scale for 32 columns, AWQ": Quantize(bits=4, tables=4, group=32, **alone, rounding="awq", samples=SAMPLES),
        "4 bits, a scale for 32 columns, dynamic": Quantize(bits=4, tables=4, group=32, **in_blocks, samples=subject.samples),
        "8 bits, a scale for 128 columns, dynamic": Quantize(group=128, activations="dynamic", samples=subject.samples),
        "8 bits, weights alone": Quantize(activations="none"),
        "8 bits, static": Quantize(samples=SAMPLES),
        "3 bits, a scale for 32 columns": Quantize(bits=3, tables=3, group=32, **alone, samples=subject.samples),
    }.items():
        yield Row(name, lambda technique=technique: technique(original, task), judge)
        if name.endswith("to nearest"):
            yield from quantization_peers.minilm(original, task, judge)


def lite0(seed: int) -> Iterator[Row]:
    """EfficientNet-Lite0: the whole file, calibrated on changed crops, judged on crops of other photos."""
    subject = SUBJECTS["lite0"]
    start = subject.start()
    assert start.model is not None
    task = Task(start.model, start.example, {"calibrate": start.calibrate}, progress=Progress())
    judge, original = judge_of(task, subject), capture(task.model, task.example)
    yield Row("float", lambda: original, judge)
    alone: dict[str, Any] = {"bits": 4, "activations": "none", "ends": 8}
    for name, technique in {
        "8 bits, static": Quantize(samples=SAMPLES),
        "4 bits, weights alone, to nearest": Quantize(**alone, rounding="nearest"),
        "4 bits, weights alone, GPTQ": Quantize(**alone, samples=SAMPLES),
        "4 bits, weights alone, reconstructed": Quantize(**alone, samples=SAMPLES, reconstruct=STEPS),
        "4 bits, activations in 8, reconstructed": Quantize(bits=4, samples=SAMPLES, reconstruct=STEPS),
        "mixed, at most 60 % of the 8-bit file": Quantize(widths=(2, 3, 4, 5, 6, 8), size="56%", samples=SAMPLES),
    }.items():
        yield Row(name, lambda technique=technique: technique(original, task), judge)
    yield from quantization_peers.lite0(original, task, judge)


CASES = {"lite0": lite0, "minilm": minilm}
