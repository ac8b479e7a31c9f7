"""Calibration data for pruning: to solve on, to choose by, and which positions are padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import TaskError
from ..network.network import Network, batch_of
from ..network.padding import padding_port
from ..network.statistics import Pieces
from ..task import Task

# How many held-back pieces judge a width, and into how many at least the samples are parted.
TRIAL_PIECES = 48
PIECES = 64


@dataclass(frozen=True)
class Data:
    """Calibration inputs to fit on (``fit``), and others to judge by (``held``, and of these a few: ``trial``); ``port`` marks padding."""

    fit: Pieces
    held: Pieces
    trial: Pieces
    port: int | None


def collected(network: Network, task: Task, samples: int, holdout: int) -> Data:
    """At most so many calibration samples, parted: every ``holdout``-th piece judges.

    Raises:
        TaskError: fewer than two samples.
    """
    rows = max(1, samples // PIECES)
    pieces = Pieces.of(network, in_rows(network, task.batches("calibrate"), rows), samples)
    if len(pieces) < 2 and rows > 1:
        pieces = Pieces.of(network, in_rows(network, task.batches("calibrate"), 1), samples)
    if len(pieces) < 2:
        raise TaskError("There is one calibration sample; expected at least two, one to solve on and one to judge by: give a hundred, or samples=0.")
    fit, held = pieces.parted(max(2, min(holdout, len(pieces))))
    return Data(fit, held, held[:: max(1, -(-len(held) // TRIAL_PIECES))], padding_port(network, pieces))


def in_rows(network: Network, batches: Iterable[tuple[Any, Any]], rows: int) -> Iterator[tuple[Any, Any]]:
    """The batches in parts of at most so many samples, so that few large ones can be parted too; those without an open batch as they come."""
    for inputs, targets in batches:
        count = next((leaf.shape[0] for port, leaf in zip(network.ports, network.flat(inputs), strict=True) if port.dims[:1] == ("batch",)), 0)
        if not count:
            yield inputs, targets
        for start in range(0, count, rows):
            yield batch_of(inputs, list(range(start, min(start + rows, count)))), None
