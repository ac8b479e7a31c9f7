"""Scores: how good a model's answers are, by one number, higher is better.

A score is any function ``(predict, batches) -> float``. ``predict`` gives a model's outputs for a batch's inputs, be it the original
model or a file in its runtime; ``batches`` are pairs ``(inputs, targets)``. The functions here take torch tensors and numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .errors import DownsizeError, TaskError
from .numerics.agreement import as_array, cosines
from .structure import flatten

Predict = Callable[[Any], Any]
Batches = Iterable[tuple[Any, Any]]
Score = Callable[[Predict, Batches], float]

IGNORED = -100  # the class number that torch's cross entropy leaves out, too


def top1(predict: Predict, batches: Batches) -> float:
    """The fraction of right classes. Outputs: class scores [..., classes], the one named ``logits`` or else the first; targets: int [...].

    Targets of -100 are left out; scores that are NaN are wrong answers.

    Raises:
        TaskError: targets are None, not whole numbers, of another shape, or name a class that does not exist.
    """
    return _top(predict, batches, 1)


def top5(predict: Predict, batches: Batches) -> float:
    """The fraction of samples whose right class is among the five with the largest scores; inputs and errors as :func:`top1`."""
    return _top(predict, batches, 5)


def fidelity(predict: Predict, batches: Batches) -> float:
    """Mean cosine between the outputs and the targets, which are the original model's outputs in the same structure; 1 is the same.

    The score of a task without labels: see :func:`downsize.numerics.agreement.cosines` for what a sample's vector is.

    Raises:
        TaskError: there are no batches, or targets are None.
    """
    total, count = 0.0, 0
    for inputs, targets in batches:
        if targets is None:
            raise TaskError("fidelity compares with the original model's outputs, but targets are None: give those outputs as targets.")
        values = cosines(flatten(targets)[0], flatten(predict(inputs))[0])
        total, count = total + float(values.sum()), count + len(values)
    if not count:
        raise TaskError("fidelity got no samples; expected at least one batch with at least one sample.")
    return total / count


FRACTIONS: tuple[Score, ...] = (top1, top5, fidelity)
"""The scores that lie between 0 and 1, so that they can be shown in percent."""


def evaluate(score: Score, predict: Predict, batches: Batches, what: str) -> float:
    """The score as a float; ``what`` says what is judged on which data, for messages.

    Raises:
        TaskError: the score raised, gave something else than one number, or NaN or infinity.
    """
    name = getattr(score, "__name__", type(score).__name__)
    try:
        value = score(predict, batches)
    except DownsizeError:
        raise
    except Exception as error:
        raise TaskError(f"the score {name!r} of {what} raised {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TaskError(f"the score {name!r} of {what} gave {value!r}; expected one number.") from None
    if not math.isfinite(number):
        raise TaskError(f"the score {name!r} of {what} is {number}; expected a finite number: check the score and the targets.")
    return number


def _top(predict: Predict, batches: Batches, count: int) -> float:
    right, seen = 0, 0
    for inputs, targets in batches:
        scores = class_scores(predict(inputs))
        classes = _class_numbers(targets, scores, count)
        kept = classes != IGNORED
        scores, classes = scores[kept].astype(np.float64), classes[kept]
        largest = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        hit = (largest == classes[:, None]).any(axis=1) & ~np.isnan(scores).any(axis=1)
        right, seen = right + int(hit.sum()), seen + len(hit)
    if not seen:
        raise TaskError(f"top{count} got no samples; expected at least one batch with at least one target that is not {IGNORED}.")
    return right / seen


def class_scores(outputs: Any) -> np.ndarray:
    """The output named ``logits``, or else the first one, as an array."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return as_array(outputs["logits"])
    tensors = flatten(outputs)[0]
    if not tensors:
        raise TaskError("the model gives no tensor; expected class scores [samples, classes].")
    return as_array(tensors[0])


def _class_numbers(targets: Any, scores: np.ndarray, count: int) -> np.ndarray:
    if targets is None:
        raise TaskError(f"top{count} needs the right classes, but targets are None: give them, or leave the score out of the task.")
    if scores.ndim < 2 or scores.shape[-1] <= count:
        raise TaskError(f"top{count} needs class scores [samples, classes] with more than {count} classes; the output is {list(scores.shape)}.")
    classes = as_array(targets)
    if classes.dtype.kind not in "iu" or classes.shape != scores.shape[:-1]:
        raise TaskError(
            f"targets are {classes.dtype} {list(classes.shape)}; top{count} of outputs {list(scores.shape)} expects class numbers, whole "
            f"numbers {list(scores.shape[:-1])}: use argmax(-1) on one-hot targets, squeeze(-1) on a column."
        )
    wrong = classes[(classes != IGNORED) & ((classes < 0) | (classes >= scores.shape[-1]))]
    if wrong.size:
        raise TaskError(f"targets name class {wrong.flat[0]}; the model has the classes 0 to {scores.shape[-1] - 1}.")
    return classes
