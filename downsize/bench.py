"""Where recipes become files and files are measured, for one task, one target and one run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import Run, Stage, seeded
from .facts import Agreement, Artifact, Measurement
from .measure import host, latency, memory, size
from .measure.process import label
from .measure.score import Recording
from .numerics.agreement import as_array
from .progress import Progress
from .recipe import Recipe, Technique
from .runtimes import Runtime, open_artifact
from .structure import as_call, flatten
from .target import Target
from .task import Task

if TYPE_CHECKING:
    from .network.network import Network


@dataclass(frozen=True)
class Bench:
    """The original model, captured and exported, and what it takes to build recipes from it and to measure them beside it.

    ``inputs`` is the batch that latency and memory are measured on, with ``target.batch`` samples; ``data_key`` is a hash of the
    calibration data, because a step's bytes depend on them; ``baseline`` is the original model's file; ``recordings`` are the original's
    outputs by role, each recorded once.
    """

    task: Task
    target: Target
    run: Run
    progress: Progress
    runtime: Runtime
    original: Stage
    data_key: str
    inputs: Any
    baseline: Path
    recordings: dict[str, Recording] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @classmethod
    def set_up(cls, task: Task, target: Target, runtime: Runtime, run: Run, progress: Progress) -> Bench:
        """Check the task, capture the model and export it: a model for which that fails is refused before anything else is done.

        Raises:
            TaskError, CaptureError, ExportError, RunError
        """
        from .network.capture import capture
        from .network.network import batch_of

        with progress.doing("checking the task"), seeded("task"):
            for remark in task.check():
                progress.say(f"note: {remark}")
        with progress.doing("capturing the model"), seeded("data"):
            network = capture(task.model, task.example, more=task.variations())
            original = run.network(["capture", network.fingerprint()], lambda: network, needs=tensor_bytes(network))
        with seeded("data"):
            data_key = digest_of(task.batches("calibrate"))
        with seeded("data"):
            first, _ = next(task.batches("calibrate"))
        inputs = batch_of(first, [row % samples_of(first) for row in range(target.batch)])
        bench = cls(task, target, run, progress, runtime, original, data_key, inputs, Path())
        return replace(bench, baseline=bench.export(original))

    def build(self, recipe: Recipe) -> Path:
        """The file of a recipe: one step of the run for each technique and one for the export, found or built."""
        stage = self.original
        for technique in recipe:
            stage = self._apply(technique, str(Recipe((technique,), recipe.techniques)), stage)
        return self.export(stage)

    def _apply(self, technique: Technique, spelled: str, stage: Stage) -> Stage:
        parts = [stage.key, spelled, f"data {self.data_key}"]
        task = replace(self.task, progress=self.progress)
        if getattr(technique, "latency", None) is not None:
            from .measure.shapes import LatencyTable

            # What is chosen by measured time holds for this machine and runtime.
            task = replace(task, clock=LatencyTable(self.runtime.name, self.target.threads))
            parts.append(f"timed in {label(self.runtime.name)} with {self.target.threads} threads on {host()}")
        if (kernels := getattr(technique, "kernels", "x86")) != "x86":
            parts.append(f"for kernels {kernels}")  # which ``auto`` takes from this machine's processor
        if _trains(technique):
            parts.append(f"train {self._training_key()}")
        task = replace(task, checkpoints=self.run.place(parts))
        with self.progress.doing(f"building {spelled}"):
            made = self.run.network(parts, lambda: technique(stage.network, task), needs=tensor_bytes(stage.network))
        self.run.clear(parts)
        return made

    def _training_key(self) -> str:
        """A hash of what training depends on beside the network and the calibration inputs, computed once."""
        if "train" not in self.keys:
            from .training.digest import digest

            task = self.task
            digests = [digest(dict(task.models), task.loss, task.score)]
            for role in ("train" if "train" in task.data else "calibrate", "validate"):
                if role in task.data:
                    with self.progress.doing(f"reading the data for {role!r}"), seeded("data"):
                        digests += [role, digest_of(task.batches(role), targets=True)]
            self.keys["train"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return self.keys["train"]

    def export(self, stage: Stage) -> Path:
        """The file of a network in the target's runtime."""
        name = f"model{self.runtime.suffix}"
        parts = [stage.key, f"export {self.runtime.name}"]
        with self.progress.doing(f"exporting for {self.runtime.name}"):
            folder = self.run.step(parts, lambda path: self.runtime.export(stage.network, path / name), needs=tensor_bytes(stage.network))
        return folder / name

    def weigh(self, path: Path) -> dict[str, Measurement]:
        """The size, which costs nothing to know."""
        return {"size": size(path)}

    def time(self, path: Path, seconds: float) -> dict[str, Measurement]:
        """Latency, interleaved with the original's, and peak memory where the target limits it."""
        name, threads = self.runtime.name, self.target.threads
        with self.progress.doing(f"measuring the latency, {seconds:g} s"):
            found = dict(latency(path, self.inputs, name, threads, baseline=self.baseline, seconds=seconds))
        if self.target.memory is not None:
            with self.progress.doing("measuring the memory"):
                found["memory"] = memory(path, self.inputs, name, threads)
        return found

    def judge(self, path: Path, role: str) -> tuple[dict[str, Measurement], Agreement]:
        """The score of a file in its runtime, paired with the original's on the same data, and the agreement of their outputs."""
        name = self.runtime.name
        with self.progress.doing(f"scoring on the data for {role!r}"), seeded("data"):
            if role not in self.recordings:
                self.recordings[role] = Recording(self.task.predict, self.task.batches(role))
            found = self.recordings[role].judge(open_artifact(path, name, self.target.threads), self.task.score)
        facts = {"sha256": Artifact.of(path, name).sha256, "host": host(), "runtime": label(name)}
        return {key: replace(measurement, **facts) for key, measurement in found.measurements.items()}, found.agreement


def samples_of(inputs: Any) -> int:
    """The samples in a batch: the first dimension of its first tensor that has one."""
    return next((leaf.shape[0] for leaf in flatten(list(as_call(inputs)))[0] if leaf.shape), 1)


def tensor_bytes(network: Network) -> int:
    """The bytes of all tensors of a network, about those of its file."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for _, tensor in network.named_tensors()}.values())


def _trains(technique: Technique) -> bool:
    """Whether a technique trains, by itself or by a plan in one of its fields (``True`` there is a plan, too)."""
    from .training.plan import Training

    plans = [getattr(technique, name, False) for name in ("train", "tune")]
    return isinstance(technique, Training) or any(plan is True or isinstance(plan, Training) for plan in plans)


def digest_of(batches: Iterable[tuple[Any, Any]], targets: bool = False) -> str:
    """A hash of the inputs of all batches, or of inputs and targets: structure, types, shapes and values."""
    from .training.digest import digest

    made = hashlib.sha256()
    for inputs, wanted in batches:
        leaves, structure = flatten(list(as_call(inputs)))
        made.update(repr(structure).encode())
        for array in map(as_array, leaves):
            made.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        if targets:
            made.update(digest(wanted).encode())
    return made.hexdigest()


def digest_of_model(model: Any) -> str:
    """A hash of a module's class and state, to tell one user's model from another before anything is captured."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, value in model.state_dict().items():
        array = as_array(value) if hasattr(value, "shape") else value
        digest.update(f"{name} {getattr(array, 'dtype', '')} {getattr(array, 'shape', '')}".encode())
        digest.update(array.tobytes() if hasattr(array, "tobytes") else repr(array).encode())
    return digest.hexdigest()
