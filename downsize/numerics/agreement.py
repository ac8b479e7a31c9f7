"""How near one model's outputs are to another's, and how sure a measured difference is. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..facts import Agreement

SMALLEST_PROBABILITY = 1e-12  # a probability of 0 counts as this much in the KL divergence, which would be infinite
TOLERANCE = 1e-3  # how far a row's sum or length may be from 1 for it to be read as probabilities or as a unit vector


def as_array(tensor: Any) -> np.ndarray:
    """A tensor of any library as a numpy array, without a copy where possible.

    Floats that numpy does not have (bfloat16, float8) become float32.
    """
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


def rows(array: np.ndarray) -> np.ndarray:
    """The array as floats [samples, values]; a scalar is one sample. At least float32, a view where possible."""
    wide = array if array.dtype.kind == "f" and array.dtype.itemsize >= 4 else array.astype(np.float64)
    return wide.reshape(len(wide), -1) if wide.ndim else wide.reshape(1, 1)


def cosines(reference: Sequence[Any], other: Sequence[Any]) -> np.ndarray:
    """The cosine between two models' outputs, for each sample: float64 [samples].

    A sample's vector is everything the model gives for it: all outputs that share the first output's leading size, joined. Two zero
    vectors have the cosine 1; one zero vector has the cosine 0.

    A single number has no direction but its sign. There it is 2ab / (a² + b²) instead, which is 1 for equal numbers alone, and near there falls with
    the relative difference as a cosine falls with the angle: 1 - d² / 2.

    Raises:
        ArtifactError: the outputs differ in number or shape.
    """
    pairs = _paired(reference, other)
    pairs = [(left, right) for left, right in pairs if len(left) == len(pairs[0][0])]
    dot = np.sum([_inner(left, right) for left, right in pairs], axis=0)
    mine, theirs = (np.sum([_inner(pair[side], pair[side]) for pair in pairs], axis=0) for side in (0, 1))
    # One root of the product, not a product of roots: then a vector's cosine to itself is exactly 1.
    size = (mine + theirs) / 2 if sum(left.shape[1] for left, _ in pairs) == 1 else np.sqrt(mine * theirs)
    both_zero = ~np.any([left.any(axis=1) | right.any(axis=1) for left, right in pairs], axis=0)
    return np.where(mine * theirs > 0, dot / np.where(mine * theirs > 0, size, 1), both_zero)


def compare(reference: Sequence[Any], other: Sequence[Any]) -> Agreement:
    """The agreement of ``other`` with ``reference``: the outputs of two models for the same samples, in the same order.

    See :class:`Comparison` for what is measured, and for many batches.
    """
    comparison = Comparison()
    comparison.add(reference, other)
    return comparison.agreement()


class Comparison:
    """The agreement of one model's outputs with another's, batch by batch.

    * ``relative_error``: |other - reference| / |reference|, Frobenius norms over all outputs and samples;
    * ``cosine``: mean of :func:`cosines` over the samples;
    * ``top1``: the fraction of samples with the same largest class;
    * ``kl``: mean of KL(reference || other) over the samples, in nats (Kullback and Leibler, 1951).

    ``top1`` and ``kl`` are None unless the first output is class scores: floats [samples, classes], at least 2 classes, and not unit
    vectors, which are embeddings. Scores are taken as logits, or as probabilities when the reference's rows are such.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._samples = 0
        self._error_square = 0.0
        self._reference_square = 0.0
        self._cosines = 0.0
        self._same = 0
        self._kl = 0.0
        self._scores: str | None = None

    def add(self, reference: Sequence[Any], other: Sequence[Any]) -> None:
        """Count one batch: the outputs of both models, in the same order, each [samples, ...].

        Raises:
            ArtifactError: the outputs differ in number or shape, or ``other`` has values that are not finite.
        """
        self._batches += 1
        for number, output in enumerate(other):
            if bad := count_not_finite(output):
                raise ArtifactError(f"output {number} has {bad} values that are NaN or infinite in batch {self._batches}; expected finite numbers.")
        pairs = _paired(reference, other)
        for left, right in pairs:
            difference = right - left
            self._error_square += float(_inner(difference, difference).sum())
            self._reference_square += float(_inner(left, left).sum())
        self._samples += len(pairs[0][0])
        self._cosines += float(cosines(reference, other).sum())
        self._add_scores(as_array(reference[0]), *pairs[0])

    def _add_scores(self, output: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        if self._batches == 1:
            self._scores = _kind_of_scores(output)
        if self._scores is None:
            return
        self._same += int((left.argmax(1) == right.argmax(1)).sum())
        take_log = _log_probabilities if self._scores == "probabilities" else _log_softmax
        left_log, right_log = take_log(left), take_log(right)
        self._kl += float((np.exp(left_log) * (left_log - right_log)).sum())

    def agreement(self) -> Agreement:
        """The agreement over all batches so far.

        Raises:
            ArtifactError: nothing was added.
        """
        if not self._samples:
            raise ArtifactError("no samples were compared; expected at least one batch with at least one sample.")
        if self._reference_square:
            relative_error = (self._error_square / self._reference_square) ** 0.5
        else:
            relative_error = float("inf") if self._error_square else 0.0
        classes = self._scores is not None
        return Agreement(
            samples=self._samples,
            top1=self._same / self._samples if classes else None,
            relative_error=relative_error,
            cosine=self._cosines / self._samples,
            kl=max(0.0, self._kl / self._samples) if classes else None,  # rounding can leave -1e-17
        )


def bootstrap(
    statistic: Callable[[np.ndarray], Sequence[float]], units: int, *, samples: int = 300, level: float = 0.95, seed: int = 0
) -> list[tuple[float, float]] | None:
    """Percentile bootstrap intervals (Efron, 1979) of several statistics of the same units, each from the same resamples.

    Args:
        statistic: from the numbers of the drawn units, int [units], to the values of the statistics; NaN where one is not defined.
        units: how many units there are to draw from, with replacement.
        samples: how many times to draw.
        level: what share of the resampled values lies within an interval.

    Returns:
        (low, high) for each statistic; None when there are fewer than 2 units or more than a tenth of the draws gave NaN.
    """
    if units < 2:
        return None
    generator = np.random.default_rng(seed)
    values = np.array([statistic(generator.integers(0, units, units)) for _ in range(samples)], dtype=np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 0.9 * samples:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def count_not_finite(tensor: Any) -> int:
    """How many values are NaN or infinite; 0 for whole numbers."""
    array = as_array(tensor)
    return 0 if array.dtype.kind not in "fc" else array.size - int(np.isfinite(array).sum())


def _paired(reference: Sequence[Any], other: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(reference) != len(other) or not reference:
        raise ArtifactError(f"{len(other)} outputs came; expected the {len(reference)} of the original model, at least one.")
    pairs = []
    for number, (left, right) in enumerate(zip(map(as_array, reference), map(as_array, other), strict=True)):
        if left.shape != right.shape:
            raise ArtifactError(f"output {number} has the shape {list(right.shape)}; expected {list(left.shape)}, as the original model gives.")
        pairs.append((rows(left), rows(right)))
    return pairs


def _inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row-wise inner products, summed in float64 without a float64 copy: [samples]."""
    return np.einsum("nd,nd->n", left, right, dtype=np.float64)


def _kind_of_scores(output: np.ndarray) -> str | None:
    if output.ndim != 2 or output.shape[1] < 2 or output.dtype.kind != "f":
        return None
    values = output.astype(np.float64)
    if (values >= 0).all() and (np.abs(values.sum(1) - 1) < TOLERANCE).all():
        return "probabilities"
    return None if (np.abs(np.linalg.norm(values, axis=1) - 1) < TOLERANCE).all() else "logits"


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _log_probabilities(scores: np.ndarray) -> np.ndarray:
    return np.log(np.clip(scores.astype(np.float64), SMALLEST_PROBABILITY, None))
