"""Distillation: a student network learns from a teacher, with or without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ..errors import DownsizeError, SpecError, nearest
from ..network.capture import capture
from ..network.network import Network
from ..pruning.renormalise import reestimate_batch_norms
from ..spec import frozen
from ..task import Task
from ..training.distillation import Distillation, calibration
from ..training.features import features
from ..training.hook import Hook
from ..training.objective import Objective
from ..training.pairing import layers
from ..training.plan import Training
from ..training.students import STUDENTS
from ..training.teacher import Teacher


@dataclass(frozen=True)
class Source:
    """A teacher: ``predict`` gives its outputs, ``network`` makes it a network, where inner values are asked for; ``alike``: the student
    derives from it, so that layers of one name belong together."""

    predict: Callable[[Any], Any]
    network: Callable[[], Network]
    alike: bool


@frozen
class Distill(Training):
    """Train a student to give what a teacher gives; the teacher is the original model, unless another is named.

    ``prune(macs=0.5) | distill(epochs=5)`` trains what pruning has left. The state that the data for "validate" likes best is kept, the start
    included. Without labels, and with ``weight=1``, the teacher alone teaches.

    Fields: those of :class:`~downsize.training.plan.Training`, and
        student: None (the network as it comes), ``depth`` (every other repeated layer is left out), ``width`` (half of every width; weights of
            both are the network's own), or the name of a model in ``task.models``, which takes the network's place.
        teacher: None (the original model), or the name of a model in ``task.models``.
        outputs: what is compared. ``logits`` (Hinton's divergence at ``temperature``), ``standardized`` (the same of scores of mean 0 and
            deviation 1: for a small student, at temperature 2), ``dist`` (correlations; for a teacher much stronger than the student),
            ``dkd`` (decoupled), ``embedding`` (cosines, of samples with the teacher's and with one another), ``error`` (relative squared
            error), or ``auto``: logits for class scores, embedding for vectors of length 1, else error.
        weight: of the outputs' loss; the task's own has the rest where there are labels.
        features: what is compared inside, beside the outputs: ``none``, ``hint`` (values), ``attention`` (where they are large), ``relations``
            (of queries, keys and values; without attention, of distances and angles), ``similarity`` (which samples are alike).
            ``feature_weight``: how much that counts.
        generations: born again: the student of one generation teaches the next, which starts anew from where the first did (Furlanello et al.
            2018, arXiv 1805.04770).
        branches: early exits that are trained along and dropped at the end.

    Example: ``distill(student='depth', features='hint', epochs=3)``.
    """

    student: str | None = None
    teacher: str | None = None
    outputs: Literal["auto", "logits", "standardized", "dist", "dkd", "embedding", "error"] = "auto"
    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.9, ge=0, le=1)
    features: Literal["none", "hint", "attention", "relations", "similarity"] = "none"
    feature_weight: float = Field(default=1.0, ge=0)
    generations: int = Field(default=1, ge=1)
    branches: int = Field(default=0, ge=0)

    def __call__(self, network: Network, task: Task) -> Network:
        """The trained student.

        Raises:
            SpecError: there is no model of that name.
            TaskError: the student cannot be made, or what it gives cannot be compared with what the teacher gives.
        """
        start = self._student(network, task)
        plan, made = replace(self, student=None, generations=1), start
        for generation in range(self.generations):
            # Another seed a generation: else each would see the same batches in the same order.
            plan = replace(plan, seed=self.seed + generation)
            teacher = plan.teacher_of(start, task) if generation == 0 else Source(made.predict, lambda made=made: made, alike=True)
            made = plan.train(start, task, plan.taught_by(teacher, start, task))
        return made

    def train(
        self, network: Network, task: Task, objective: Objective | None = None, hooks: Sequence[Hook] = (), share: tuple[float, float] = (0.0, 1.0)
    ) -> Network:
        """As :meth:`~downsize.training.plan.Training.train`. As the plan of another technique it trains that technique's network.

        Raises:
            SpecError: it has a student of its own, or several generations.
        """
        if self.student is not None or self.generations > 1:
            raise SpecError(
                f"distill: student={self.student!r}, generations={self.generations} came inside another step, which trains its own network once; "
                "use distill(...) as a step by itself."
            )
        return super().train(network, task, objective, hooks, share)

    def objective(self, student: Network, task: Task) -> Objective:
        """What is minimised: the distance from the teacher, and the task's loss where there are labels."""
        return self.taught_by(self.teacher_of(student, task), student, task)

    def teacher_of(self, student: Network, task: Task) -> Source:
        """The teacher that was asked for."""
        taught = task if self.teacher is None else replace(task, model=_teacher(task, self.teacher))
        alike = self.teacher is None and "student" not in student.origin
        return Source(taught.predict, lambda: capture(taught.model, task.example, more=task.variations()), alike)

    def taught_by(self, teacher: Source, student: Network, task: Task) -> Objective:
        """The objective with any teacher."""
        student = student.fork().eval()
        pieces, port = calibration(student, task)
        inner, name = None, self.teacher or ""
        taught = Teacher(teacher.predict, name=name)
        if self.features != "none" and self.feature_weight > 0:
            inside = teacher.network().fork().eval()
            inner = features(self.features, self._as_trained(student, pieces), inside, pieces, teacher.alike, port)
            taught = Teacher(teacher.predict, inside, inner.teacher_taps, name)
        made = Distillation(student, task, taught, self.outputs, self.temperature, self.weight, inner, self.feature_weight, port)
        return made.with_branches(layers(student), self.branches, self.seed) if self.branches else made

    def _as_trained(self, student: Network, pieces: Sequence[list[Tensor]]) -> Network:
        """A fork with batch norms measured on these pieces, as they are in training: beside random weights their own statistics say nothing, and
        regressors fitted to values of another size would start far off."""
        made = student.fork()
        if self.norms == "train":
            reestimate_batch_norms(made, pieces)
        return made

    def _student(self, network: Network, task: Task) -> Network:
        if self.student is None:
            return network
        if self.student in STUDENTS:
            return STUDENTS[self.student](network)
        model = _model(task, self.student, STUDENTS)
        try:
            made = capture(model, task.example, more=task.variations())
        except DownsizeError as error:
            raise type(error)(f"models[{self.student!r}], the student: {error}") from error
        made.origin["student"] = self.student
        return made


def _teacher(task: Task, name: str) -> Any:
    """A further model of the task, which has been seen to run on the example."""
    model = _model(task, name, ())
    try:
        replace(task, model=model).predict(task.example)
    except DownsizeError as error:
        raise type(error)(f"models[{name!r}], the teacher: {error}") from error
    return model


def _model(task: Task, name: str, others: Any) -> Any:
    if name not in task.models:
        mend = nearest(name, [*others, *task.models]) if others or task.models else "give it as Task(..., models={name: module})."
        raise SpecError(f"there is no model {name!r} in task.models; {mend}")
    return task.models[name]
