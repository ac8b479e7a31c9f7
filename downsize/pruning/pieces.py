"""Calibration data for pruning: to solve on, to choose by, and which positions are padding."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TaskError
from ..network.network import Network
from ..network.padding import padding_port
from ..network.statistics import Pieces
from ..task import Task

# How many held-back pieces judge a width.
TRIAL_PIECES = 48


@dataclass(frozen=True)
class Data:
    """Calibration inputs to fit on (``fit``), and others to judge by (``held``, and of these a few: ``trial``); ``port`` marks padding."""

    fit: Pieces
    held: Pieces
    trial: Pieces
    port: int | None


def collected(network: Network, task: Task, samples: int, holdout: int) -> Data:
    """The calibration data, parted.

    Raises:
        TaskError: fewer than two pieces.
    """
    pieces = Pieces.of(network, task.batches("calibrate"), samples)
    if len(pieces) < 2:
        raise TaskError("There is one calibration sample; expected at least two, one to solve on and one to judge by: give a hundred, or samples=0.")
    fit, held = pieces.parted(max(2, min(holdout, len(pieces))))
    return Data(fit, held, held[:: max(1, -(-len(held) // TRIAL_PIECES))], padding_port(network, pieces))
