"""What was found out: measurements, agreements, verdicts and reports. Plain frozen data that goes to JSON and back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import FiniteFloat, ValidationError

from .errors import ArtifactError, RunError
from .spec import adapter, explain, frozen
from .target import Limit, Target, show

T = TypeVar("T")

VERSION = "0.1.0"
"""The version of downsize; pyproject.toml reads it from here."""

DROP_WORTH_TELLING = 0.01  # of the score; less is told in the table alone


def to_json(fact: Any) -> str:
    """The JSON text of an instance of a class of this module (or any :func:`~downsize.spec.frozen` class)."""
    return adapter(type(fact)).dump_json(fact, indent=2).decode()


def from_json(cls: type[T], text: str) -> T:
    """The inverse of :func:`to_json`.

    Raises:
        RunError: the text is no JSON, or does not describe a ``cls``.
    """
    try:
        return adapter(cls).validate_json(text)
    except ValidationError as error:
        raise RunError(f"a saved {cls.__name__} is damaged or of another version: {explain(error, cls, cls.__name__)}") from None


def made_by() -> dict[str, str]:
    """The versions that decide a result: downsize, Python, and the packages it computes with, without importing them."""
    versions = {"downsize": VERSION, "python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "onnx", "onnxruntime", "openvino"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@frozen
class Host:
    """The machine that measured. ``features``: instruction sets that decide speed, e.g. avx2, avx512_vnni; ``memory_bytes``: all of it."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str
    python: str


@frozen
class Measurement:
    """One number with its unit (bytes, seconds, fraction, ratio, joules, ...) and where it comes from.

    ``low`` and ``high`` bound the 95 % interval. ``sha256`` names the file, ``runtime`` the runtime and its version, e.g.
    ``"onnxruntime 1.31.1"``. A number that was computed from a model instead of measured has ``kind="modelled"``.
    """

    name: str
    value: FiniteFloat
    unit: str
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    samples: int = 1
    kind: Literal["measured", "modelled"] = "measured"
    sha256: str | None = None
    host: Host | None = None
    runtime: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({show(self.low, self.unit)} to {show(self.high, self.unit)})"
        return f"{self.name} {show(self.value, self.unit)}{interval}{', modelled' * (self.kind == 'modelled')}"


@frozen
class Agreement:
    """How near outputs are to the original model's on the same inputs.

    ``top1``: share of samples with the same largest output; ``relative_error``: norm of the difference over the norm of the original's
    outputs; ``cosine``: mean over samples; ``kl``: mean Kullback-Leibler divergence from the original's softmax, in nats. ``top1`` and
    ``kl`` are None where the output is not a table of scores.
    """

    samples: int
    top1: float | None
    relative_error: float
    cosine: float
    kl: float | None


@frozen
class Artifact:
    """A file that runs in ``runtime``."""

    path: Path
    sha256: str
    bytes: int
    runtime: str

    @classmethod
    def of(cls, path: str | Path, runtime: str) -> Artifact:
        """Describe the file at ``path``.

        Raises:
            ArtifactError: the file cannot be read.
        """
        try:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                return cls(Path(path), digest.hexdigest(), file.tell(), runtime)
        except OSError as error:
            raise ArtifactError(f"the model file {str(path)!r} cannot be read: {error.strerror}; give the path of an existing file.") from None


@frozen
class Outcome:
    """One limit judged: the measured value (None: not measured), whether it is met, and the sentence for it."""

    limit: Limit
    value: float | None
    met: bool
    text: str

    @classmethod
    def of(cls, limit: Limit, measurement: Measurement | None) -> Outcome:
        """Judge ``limit`` by its measurement. The value decides; an interval that straddles the limit is told in the text."""
        if measurement is None:
            return cls(limit, None, False, f"{limit}: not measured, so not met")
        value, name, unit = measurement.value, limit.name, limit.unit
        met = value <= limit.at_most
        digits = _digits_apart(value, limit.at_most, unit)
        judged = "met" if met else f"missed by {show(value - limit.at_most, unit)}"
        text = f"{name} {show(value, unit, digits)}, limit {show(limit.at_most, unit, digits)}: {judged}"
        if measurement.kind == "modelled":
            text += " (modelled, not measured)"
        low, high = measurement.low, measurement.high
        if low is not None and high is not None and low <= limit.at_most < high:
            text += f"; uncertain: the 95 % interval, {show(low, unit, digits)} to {show(high, unit, digits)}, straddles the limit"
        return cls(limit, value, met, text)

    @property
    def excess(self) -> float:
        """How far the value lies above the limit, relative to the limit; not above 0 when met, infinite when not measured."""
        if self.value is None:
            return float("inf")
        gap = self.value - self.limit.at_most
        if self.limit.at_most == 0 and gap > 0:
            return float("inf")
        return gap / (self.limit.at_most or 1)


def _digits_apart(value: float, limit: float, unit: str) -> int:
    """Significant digits that show two different values differently (at least 3)."""
    return next((digits for digits in range(3, 17) if show(value, unit, digits) != show(limit, unit, digits)), 3)


@frozen
class Verdict:
    """Whether all limits are met, the outcome of each, the limit that binds, and what would have to be relaxed for this file.

    ``warnings``: how the file is worse than the original where no limit asked.
    """

    met: bool
    outcomes: tuple[Outcome, ...] = ()
    binding: str | None = None
    relaxation: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def judge(cls, limits: Sequence[Limit], measurements: Mapping[str, Measurement]) -> Verdict:
        """Judge measurements, keyed by the limits' names. Binding is the limit missed by the largest relative amount.

        A limit that was not measured is not met; it binds before all others.
        """
        outcomes = tuple(Outcome.of(limit, measurements.get(limit.name)) for limit in limits)
        missed = [outcome for outcome in outcomes if not outcome.met]
        if not missed:
            return cls(True, outcomes)
        binding = max(missed, key=lambda outcome: outcome.excess).limit.name
        return cls(False, outcomes, binding, _relaxation(missed))

    def __str__(self) -> str:
        head = "met" if self.met else f"not met: {self.binding} binds"
        lines = [outcome.text for outcome in self.outcomes] or ["no limit was set"]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([head, *(f"  {line}" for line in lines), *([self.relaxation] if self.relaxation else [])])


def worse(found: Mapping[str, Measurement], original: Mapping[str, Measurement], limits: Iterable[Limit]) -> tuple[str, ...]:
    """Sentences for what has grown worse than the original although no limit asked for it: more bytes, more time, a lost score.

    Time counts where its whole 95 % interval lies above the original's, score where it is lost for sure and by more than ``DROP_WORTH_TELLING``.
    """
    limited = {limit.name for limit in limits}
    told = []
    if "size" not in limited and "size" in found and "size" in original and found["size"].value >= original["size"].value:
        own, before = found["size"].value, original["size"].value
        sizes = [show(value, "bytes", _digits_apart(own, before, "bytes")) for value in (own, before)]
        told.append(f"the file is not smaller than the original: {sizes[0]}, the original's {sizes[1]}")
    ratio, drop = found.get("latency_ratio"), found.get("drop")
    if ratio and not limited & {"latency", "latency_ratio"} and ratio.low is not None and ratio.low > 1:
        digits = _digits_apart(ratio.low, 1, "ratio")
        value, low, high = (show(number, "ratio", digits) for number in (ratio.value, ratio.low, ratio.high or ratio.value))
        told.append(f"the file is slower than the original: {value} of its time ({low} to {high}); set latency_ratio=1 to rule this out")
    if drop and "drop" not in limited and drop.low is not None and drop.low > 0 and drop.value > DROP_WORTH_TELLING:
        told.append(f"the file scores {show(drop.value, drop.unit)} less than the original, and no limit of the drop was set")
    return tuple(told)


def _relaxation(missed: Sequence[Outcome]) -> str:
    needed = [f"{outcome.limit.name} at most {show(outcome.value, outcome.limit.unit, up=True)}" for outcome in missed if outcome.value is not None]
    unknown = [outcome.limit.name for outcome in missed if outcome.value is None]
    sentences = [f"This file would meet {' and '.join(needed)}."] if needed else []
    return " ".join(sentences + ([f"Measure {' and '.join(unknown)} first."] if unknown else []))


@frozen
class Attempt:
    """One recipe that was tried: what came out, and why it was taken or not. ``recipe`` as spelled; empty for the original model."""

    name: str
    recipe: str
    artifact: Artifact | None
    measurements: dict[str, Measurement]
    agreement: Agreement | None
    verdict: Verdict | None
    taken: bool
    reason: str


@frozen
class Report:
    """All of a run: the wish, the fp32 baseline, every attempt, the name of the chosen one and its verdict, and the versions."""

    task: str
    target: Target
    baseline: Attempt
    attempts: tuple[Attempt, ...]
    chosen: str
    verdict: Verdict
    made_by: dict[str, str]
