"""Distillation without labels of two real models that pruning made smaller: EfficientNet-Lite0 and all-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import texts
from pruning_models import SUBJECTS, Subject, recorded
from rows import Row, measured
from training_data import crop_batches, sentence_batches

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.progress import Progress
from downsize.task import Task
from downsize.techniques.distill import Distill
from downsize.techniques.prune import Prune

KEPT = Path(__file__).parent.parent / "runs" / "training"
LITE0_STEPS, MINILM_STEPS = 400, 1000


def task_of(subject: Subject, train: Callable[[], Any]) -> Task:
    start = subject.start()
    assert start.model is not None
    return Task(start.model, start.example, {"calibrate": start.calibrate, "train": train}, checkpoints=KEPT / "checkpoints", progress=Progress())


def pruned(original: Network, task: Task, technique: Prune) -> Network:
    """The pruned network, made now or read from the file of an earlier making from the same network with the same fields."""
    file = KEPT / f"pruned-{hashlib.sha256(f'{original.fingerprint()} {technique}'.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        technique(original, task).save(file)
    return Network.load(file)


def quality_of(predict: Callable[[Any], Any], task: Task, subject: Subject) -> dict[str, float]:
    """The subject's figures of what a file predicts, on all its data."""
    found: dict[str, float] = {}
    for role, batches in subject.judged.items():
        expected, came, known = [], [], []
        for inputs, classes, wanted in recorded(task.model, batches()):
            expected.append(wanted)
            came.append(np.asarray(predict(inputs)))
            known.append(classes)
        found |= {f"{name}, {role}": value for name, value in subject.quality(expected, came, known).items()}
    return found


def judge_of(task: Task, subject: Subject) -> Callable[[Network], dict[str, float]]:
    """The subject's figures of the written file, on all its data."""
    return lambda network: measured(network, subject.sample(), lambda predict: quality_of(predict, task, subject))


def lite0(seed: int) -> Iterator[Row]:
    """Three quarters of the MACs, distilled on changed crops of which none comes twice."""
    subject = SUBJECTS["lite0"]
    task = task_of(subject, lambda: crop_batches(LITE0_STEPS, seed=1 + seed))
    judge, original = judge_of(task, subject), capture(task.model, task.example, more=task.variations())
    start = pruned(original, task, Prune(macs=0.75, samples=subject.samples))
    yield Row("0.75 of the MACs", lambda: start, judge)
    plan = Distill(steps=LITE0_STEPS, rate=1e-5, average=0.99, outputs="logits", temperature=1.0, features="hint", seed=seed)
    yield Row("distilled without labels", lambda: plan(start, task), judge)


def minilm(seed: int) -> Iterator[Row]:
    """Three of six layers, and half the MACs, distilled on sentences without labels; embedding tables stay as they are."""
    subject = SUBJECTS["minilm"]
    task = task_of(subject, sentence_batches)
    judge, original = judge_of(task, subject), capture(task.model, task.example, more=task.variations())
    plan = Distill(steps=MINILM_STEPS, rate=4e-4, outputs="embedding", freeze=("*embeddings*",), seed=seed)
    for name, technique in {
        "3 of 6 layers": Prune(ratio=0.5, what=("layers",), samples=texts.CALIBRATION),
        "half the MACs": Prune(macs=0.5, samples=texts.CALIBRATION),
    }.items():
        start = pruned(original, task, technique)
        yield Row(name, lambda start=start: start, judge)
        yield Row(f"{name}, distilled", lambda start=start: plan(start, task), judge)


CASES = {"lite0": lite0, "minilm": minilm}
