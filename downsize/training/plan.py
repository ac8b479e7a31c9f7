"""How long, how fast and with what to train: the settings that every training technique shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..errors import SpecError
from ..network.network import Network
from ..spec import frozen
from ..task import Task
from .distillation import Distillation, calibration
from .hook import Hook
from .loop import Settings, train
from .objective import Objective
from .penalties import hooks_for
from .teacher import Teacher

EPOCHS = 3.0


@frozen
class Training:
    """Train a network on the data for "train" (else "calibrate"); by itself to imitate the original model's outputs, which needs no labels.

    Fields:
        epochs: passes over the data (3). ``steps``: instead, so many optimizer steps.
        rate: the largest learning rate. ``schedule``: how it falls to zero (``cosine``, ``linear``) or not (``constant``).
            ``warmup``: the share of the steps in which it rises from zero.
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9). ``decay``: weight decay, of weights of two dimensions and more.
        clip: the largest norm of all gradients together; None: as they are.
        precision: ``float32``, ``bfloat16`` (products in 16 bits, weights and sums in 32), or ``auto``: timed, the faster one.
        average: train on, but keep the moving average of the weights, with this factor a step, e.g. 0.99.
        norms: batch norms: ``train`` (statistics move) or ``freeze`` (they stay). ``renormalise``: measure them again at the end, kept where
            validation agrees.
        penalty: pulls towards zero what can be cut behind it: ``l1`` (weights), ``group_l1`` (units of channels, heads, neurons), ``scale`` (scales
            of batch norms, for ``prune(importance='scale')``). ``strength``: how hard; a step takes rate times strength.
        freeze: tensors that stay as they are, by name, ``*`` standing for anything: ``['*embeddings*']``.
        every: validate behind so many steps, instead of each epoch.
        seed: of the data's order and of dropout.
        minutes: between checkpoints, where the run has a place for them.
    """

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=0)
    rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    average: float | None = Field(default=None, gt=0, lt=1)
    norms: Literal["train", "freeze"] = "train"
    renormalise: bool = False
    penalty: Literal["none", "l1", "group_l1", "scale"] = "none"
    strength: float = Field(default=0.1, ge=0)
    freeze: tuple[str, ...] = ()
    every: int | None = Field(default=None, ge=1)
    seed: int = 0
    minutes: float = Field(default=5.0, ge=0)

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise SpecError(f"epochs={self.epochs} and steps={self.steps} came; expected one of them.")

    def objective(self, student: Network, task: Task) -> Objective:
        """What is minimised: here the distance of the student's outputs from the original model's, by the loss that fits each output."""
        student = student.fork().eval()
        return Distillation(student, task, Teacher(task.predict), weight=1.0, port=calibration(student, task)[1])

    def train(
        self, network: Network, task: Task, objective: Objective | None = None, hooks: Sequence[Hook] = (), share: tuple[float, float] = (0.0, 1.0)
    ) -> Network:
        """The trained network; the one given is left as it was. Zeros that must stay (``network.sparse``) stay.

        Args:
            objective: instead of :meth:`objective`.
            hooks: what acts inside the loop.
            share: which part of the steps this is of the whole plan, for techniques that train in several stages: the schedule of the learning
                rate goes on from one to the next. (0, 1) is all of it.

        Raises:
            TaskError: nothing can be trained, or the data does not fit.
            TrainingError: the loss is NaN or infinite; the message has step, learning rate and batch.
        """
        pulls = [] if self.penalty == "none" else hooks_for(network, self.penalty, self.strength)
        return train(network, task, objective or self.objective(network, task), [*hooks, *pulls], self.settings(share))

    def settings(self, share: tuple[float, float] = (0.0, 1.0)) -> Settings:
        """The plan as the loop takes it."""
        return Settings(
            epochs=self.epochs if self.epochs is not None or self.steps is not None else EPOCHS,
            steps=self.steps,
            rate=self.rate,
            schedule=self.schedule,
            warmup=self.warmup,
            optimizer=self.optimizer,
            decay=self.decay,
            clip=self.clip,
            precision=self.precision,
            average=self.average,
            norms=self.norms,
            renormalise=self.renormalise,
            freeze=self.freeze,
            every=self.every,
            seed=self.seed,
            minutes=self.minutes,
            share=share,
        )
