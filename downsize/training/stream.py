"""Training batches without end, from a place that can be told and found again."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import TaskError
from ..task import Task
from .digest import digest


class Stream:
    """The batches of one epoch after another.

    Data that shuffles or augments draws from the generators of Python, numpy and torch. While a batch is made, these have states of the
    stream's own, which depend on seed, epoch and the batches before it in the epoch alone: so :meth:`seek` finds the same batch again,
    whatever else draws random numbers in between.

    Args:
        make: gives the batches ``(inputs, targets)`` of an epoch; called anew for each.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], seed: int) -> None:
        self.make, self.seed = make, seed
        self.epoch, self.number = 0, 0  # of the next batch
        self.last: Any = None  # the batch before it
        self._batches: Iterator[Any] | None = None
        self._states: tuple[Any, ...] | None = None

    def next(self) -> Any:
        """The next batch; behind the last one of an epoch the first of the next.

        Raises:
            TaskError: an epoch has no batches; whatever the user's data raises.
        """
        with self._own_states():
            for _ in range(2):
                if self._batches is None:
                    self._batches = iter(self.make())
                batch = next(self._batches, None)
                if batch is not None:
                    self.number += 1
                    self.last = batch
                    return batch
                self.epoch, self.number, self._batches = self.epoch + 1, 0, None
                _seed(self.seed, self.epoch)
        raise TaskError('data["train"] gave no batch in an epoch; expected at least one, each time.')

    def seek(self, epoch: int, number: int) -> None:
        """Go on with batch ``number`` of ``epoch``, both counted from 0; with the next epoch, should this one have fewer."""
        self.epoch, self.number, self.last, self._batches, self._states = epoch, 0, None, None, None
        while self.number < number and self.epoch == epoch:
            self.next()

    def seen(self) -> str:
        """A hash of the batch before the next: what tells whether the data still is what it was."""
        return digest(self.last)

    def length(self, most: int | None = None) -> int:
        """The batches of an epoch: by ``len`` where the data has one, else counted, to ``most`` at most. The place stays as it is."""
        with drawing(self.seed, self.epoch):
            batches = self.make()
            with contextlib.suppress(TypeError):
                return len(batches)  # type: ignore[arg-type]
            return sum(1 for _ in islice(batches, most))

    @contextlib.contextmanager
    def _own_states(self) -> Iterator[None]:
        outer = states()
        if self._states is None:
            _seed(self.seed, self.epoch)
        else:
            set_states(self._states)
        try:
            yield
        finally:
            self._states = states()
            set_states(outer)


class Batches:
    """The batches of a task's role, with the length of the user's iterable where that has one."""

    def __init__(self, task: Task, role: str) -> None:
        self.task, self.role = task, role

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self.task.batches(self.role)

    def __len__(self) -> int:
        return len(self.task.data[self.role]())  # type: ignore[arg-type]


@contextlib.contextmanager
def drawing(*parts: object) -> Iterator[None]:
    """Random states of Python, numpy and torch that depend on ``parts`` alone; the caller's are put back at the end."""
    outer = states()
    _seed(*parts)
    try:
        yield
    finally:
        set_states(outer)


def states() -> tuple[Any, ...]:
    """The states of the generators of Python, numpy and torch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_states(values: tuple[Any, ...]) -> None:
    """The inverse of :func:`states`."""
    random.setstate(values[0])
    np.random.set_state(values[1])
    torch.set_rng_state(values[2])


def seed_of(*parts: object) -> int:
    """A seed of 31 bits that depends on all parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def seed_torch(seed: int) -> None:
    """As ``torch.manual_seed``, which without a GPU keeps a record of every call for one that may come."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _seed(*parts: object) -> None:
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed)
