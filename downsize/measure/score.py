"""How much worse a file answers than the original model: scores on the same data, with an interval for the difference. numpy only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArtifactError, TaskError
from ..facts import Agreement, Measurement
from ..inputs import named
from ..numerics.agreement import Comparison, bootstrap, count_not_finite
from ..scores import FRACTIONS, Predict, Score, evaluate, fidelity
from ..spool import Spool, tree_map
from ..structure import flatten, looks_like_tensor

SAME = 1e-6  # relative difference up to which two ways to compute one score give the same
TRIED = 3  # how many resamples confirm that a score is the mean of its units' scores


@dataclass(frozen=True)
class Judgement:
    """What :func:`judge` found. ``measurements``: "score", "baseline_score" and "drop" (baseline minus score, an absolute loss)."""

    measurements: dict[str, Measurement]
    agreement: Agreement


def judge(reference: Predict, artifact: Predict, score: Score | None, batches: Iterable[Any], *, samples: int = 300, seed: int = 0) -> Judgement:
    """Run two models over the same batches, each once, and compare their scores and outputs.

    Args:
        reference: the original model; from inputs to outputs.
        artifact: the other one, same inputs and structure of outputs.
        score: higher is better; it is given ``predict`` and the batches again, where ``predict`` knows the outputs for these inputs. It
            may call ``predict`` with other inputs: then the model runs. None, or batches whose targets are None: fidelity to the original.
        batches: pairs (inputs, targets), read once. They wait in a temporary file, not in memory.
        samples: how often the data is drawn again for the 95 % intervals.
        seed: of the drawing.

    Raises:
        TaskError: no batches; some with and some without targets; the original's outputs or the score are NaN or infinite; the score fails.
        ArtifactError: the artifact's outputs have another structure or shape, or are NaN or infinite.
        MeasureError: no space for the temporary file.
    """
    return Recording(reference, batches).judge(artifact, score, samples=samples, seed=seed)


class Recording:
    """The original model's outputs over some batches, recorded once to :meth:`judge` any number of files; arguments as :func:`judge`."""

    def __init__(self, reference: Predict, batches: Iterable[Any]) -> None:
        self._reference = reference
        self._spool = Spool()
        labelled = set()
        for number, (inputs, targets) in enumerate(batches, start=1):
            outputs = reference(inputs)
            for place, tensor in enumerate(flatten(outputs)[0]):
                if bad := count_not_finite(tensor):
                    raise TaskError(f"the original model's output {place} has {bad} values that are NaN or infinite in batch {number}.")
            labelled.add(targets is not None)
            self._spool.append((inputs, targets, outputs))
        if len(labelled) != 1:
            came = "batches with and without targets" if labelled else "no batches"
            raise TaskError(f"the data to judge on has {came}; expected batches (inputs, targets), all or none with targets None.")
        self._labelled = labelled.pop()

    def judge(self, artifact: Predict, score: Score | None, *, samples: int = 300, seed: int = 0) -> Judgement:
        """Compare ``artifact`` with the recorded outputs; see :func:`judge`."""
        answers, agreement = self._run(artifact)
        note = None
        if score is None or not self._labelled:
            note = "fidelity to the original: the task has no score" if score is None else "fidelity to the original: the targets are None"
            score = fidelity
        whole = [
            Unit(inputs, outputs if score is fidelity else targets, outputs, answer)
            for (inputs, targets, outputs), answer in zip(self._spool.views(), answers.views(), strict=True)
        ]
        trial = _Trial(score, self._reference, artifact)
        unit = "fraction" if score in FRACTIONS else ""
        return Judgement(_measure(trial, whole, samples, seed, unit, note), agreement)

    def _run(self, artifact: Predict) -> tuple[Spool, Agreement]:
        answers, comparison = Spool(), Comparison()
        for number in range(len(self._spool)):
            inputs, _, outputs = self._spool.read(number)
            answer = artifact(inputs)
            (expected, structure), (came, other) = flatten(outputs), flatten(answer)
            if structure != other:
                raise ArtifactError(f"the outputs have the structure {other}; expected the original model's, {structure}.")
            comparison.add(expected, came)
            answers.append(answer)
        return answers, comparison.agreement()


class Unit(NamedTuple):
    """What is drawn as one when data is drawn again: a sample, or a batch that cannot be split; with both models' outputs."""

    inputs: Any
    targets: Any
    reference: Any
    artifact: Any


class _Trial:
    """A score of both models on chosen units, with outputs that are known already."""

    def __init__(self, score: Score, reference: Predict, artifact: Predict) -> None:
        self._score = score
        self._runs = (reference, artifact)
        self.ran = False  # whether the score asked for inputs that are not known
        self._known: dict[tuple[int, ...], Unit] = {}  # a Unit holds its inputs, so their ids stay theirs

    def learn(self, units: Iterable[Unit]) -> None:
        self._known |= {_identity(unit.inputs): unit for unit in units}

    def scores(self, units: Sequence[Unit]) -> tuple[float, float]:
        """The original's score and the artifact's."""
        batches = [(unit.inputs, unit.targets) for unit in units]
        return self._of(0, batches), self._of(1, batches)

    def _of(self, which: int, batches: list[tuple[Any, Any]]) -> float:
        def predict(inputs: Any) -> Any:
            unit = self._known.get(_identity(inputs))
            if unit is not None:
                return (unit.reference, unit.artifact)[which]
            self.ran = True
            return self._runs[which](inputs)

        return evaluate(self._score, predict, batches, ("the original model", "the artifact")[which])


def _identity(inputs: Any) -> tuple[int, ...]:
    return tuple(id(leaf) for leaf in named(inputs).values())


def _measure(trial: _Trial, whole: list[Unit], samples: int, seed: int, unit: str, note: str | None) -> dict[str, Measurement]:
    trial.learn(whole)
    baseline, value = trial.scores(whole)
    units, bounds, why = _bounds(trial, whole, (baseline, value), samples, seed)
    note = "; ".join(part for part in (note, why) if part) or None
    rows = (("baseline_score", baseline, unit), ("score", value, unit), ("drop", _tidy(baseline - value), "fraction"))
    return {
        name: Measurement(name, number, unit, low, high, samples=units, note=note)
        for (name, number, unit), (low, high) in zip(rows, bounds or [(None, None)] * 3, strict=True)
    }


def _bounds(
    trial: _Trial, whole: list[Unit], total: tuple[float, float], samples: int, seed: int
) -> tuple[int, list[tuple[float, float]] | None, str | None]:
    """How many units were drawn from, the intervals of (baseline score, score, drop), and if there are none, why."""
    if trial.ran:  # 300 draws would run both models 300 times
        return len(whole), None, "no interval: the score calls predict with inputs of its own"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scores may warn about single samples, such as metrics that need two classes
        units = _split(trial, whole, total)
        if len(units) < 2:
            return len(units), None, "no interval: there is one unit only"
        bounds = bootstrap(_statistic(trial, units, total, seed), len(units), samples=samples, seed=seed)
    return len(units), bounds, None if bounds else "no interval: the score is not defined for most redrawn data"


def _tidy(difference: float) -> float:
    """Without the last rounding errors: a drop from 0.75 to 0.70 is 0.05, so that a limit of 5 % is met."""
    return round(difference, 12)


def _statistic(trial: _Trial, units: list[Unit], total: tuple[float, float], seed: int) -> Any:
    """From the numbers of drawn units to (baseline score, score, drop); cheap when the score is the mean of the units' scores."""

    def redo(drawn: np.ndarray) -> tuple[float, float, float]:
        try:
            baseline, value = trial.scores([units[i] for i in drawn])
        except TaskError:
            return math.nan, math.nan, math.nan
        return baseline, value, _tidy(baseline - value)

    try:
        each = np.array([trial.scores([unit]) for unit in units])
    except TaskError:  # not defined for one unit alone
        return redo

    def average(drawn: np.ndarray) -> tuple[float, float, float]:
        baseline, value = each[drawn].mean(axis=0)
        return baseline, value, _tidy(baseline - value)

    generator = np.random.default_rng([seed, 1])
    checks = [(average(np.arange(len(units)))[:2], total)]
    checks += [(average(drawn)[:2], redo(drawn)[:2]) for drawn in generator.integers(0, len(units), (TRIED, len(units)))]
    return average if all(_same(one, other) for one, other in checks) else redo


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=SAME, abs_tol=1e-12) for a, b in zip(one, other, strict=True))


def _split(trial: _Trial, whole: list[Unit], total: tuple[float, float]) -> list[Unit]:
    """Single samples, if all batches can be cut into them and the score stays the same; else the batches."""
    counts = [_count(unit) for unit in whole]
    if None in counts:
        return whole
    singles = [_cut(unit, i) for unit, count in zip(whole, counts, strict=True) for i in range(count or 0)]
    trial.learn(singles)
    try:
        return singles if _same(trial.scores(singles), total) else whole
    except TaskError:
        return whole


def _count(unit: Unit) -> int | None:
    """The leading size that all tensors of a unit share; None if there is none, or targets are more than tensors."""
    leaves: list[Any] = []
    tree_map(leaves.append, tuple(unit))
    tensors = [leaf for leaf in leaves if looks_like_tensor(leaf)]
    targets: list[Any] = []
    tree_map(targets.append, unit.targets)
    if any(not looks_like_tensor(leaf) and leaf is not None for leaf in targets):
        return None
    sizes = {leaf.shape[0] if len(leaf.shape) else None for leaf in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def _cut(unit: Unit, i: int) -> Unit:
    return Unit(*(tree_map(lambda leaf: leaf[i : i + 1] if looks_like_tensor(leaf) else leaf, part) for part in unit))
