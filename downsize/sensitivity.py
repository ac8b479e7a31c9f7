"""Which layers of a task's model suffer from fewer bits: what `inspect --sensitivity` shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TaskError

if TYPE_CHECKING:
    from .progress import Progress
    from .quantization.diagnosis import Sensitivity
    from .quantization.mixed import By

SAMPLES, HELD = 64, 8  # samples that are read, and how many of them losses are measured on


def sensitivity(what: str, by: By = "loss", progress: Progress | None = None) -> list[Sensitivity]:
    """For each weight of the model of a task file, see :class:`~downsize.quantization.diagnosis.Sensitivity`.

    Raises:
        TaskError: it is no task file (only a task brings data), or the task cannot be used. CaptureError: the model cannot be captured.
    """
    if Path(what).suffix != ".py":
        raise TaskError(f"{what} brings no data to measure losses on; give the task file: downsize inspect TASK.py --sensitivity.")
    from .network.capture import capture
    from .network.rewrite import fold_batch_norm
    from .network.statistics import Pieces
    from .quantization.building import prepared
    from .quantization.diagnosis import diagnose
    from .quantization.weight_only import Data
    from .task import load_task

    task = load_task(what)
    network = prepared(capture(task.model, task.example, more=task.variations()))
    fold_batch_norm(network)
    pieces = Pieces.of(network, task.batches("calibrate"), SAMPLES)
    fit, held = pieces.parted(max(2, len(pieces) // HELD)) if len(pieces) > 1 else (pieces, pieces)
    return diagnose(network, Data(fit, held), by=by, progress=progress)
