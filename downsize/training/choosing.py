"""Training against the closed form for the same demand: a short training can lose to it, and then the closed form is what is kept."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DownsizeError
from ..network.network import Network
from ..progress import Progress
from ..task import Task
from .devices import Devices
from .stream import drawing
from .validation import Validation


def better(task: Task, trained: Network, solve: Callable[[], Network]) -> Network:
    """``trained``, or what ``solve`` makes where validation scores that higher; without data for "validate", ``trained``.

    A closed form that its data or the memory does not allow is no reason to lose a training: ``trained`` then stays. Of several processes one
    that prefers ``trained`` decides.
    """
    # What is drawn must not depend on whether the training was resumed, and both are judged on the same.
    with drawing("validate"):
        validation = Validation(task)
    score = _score(validation, trained)
    if score is None:
        return trained
    devices = Devices.found()
    progress: Progress = task.progress if task.progress and devices.main else Progress(quiet=True)
    solved, other = trained, None
    try:
        with progress.doing("solving, for comparison with what was trained"), drawing("solve"):
            solved = solve()
        other = _score(validation, solved)
    except (DownsizeError, ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        progress.say(f"note: not compared with the closed form: {error}")
    if devices.any(other is None or other <= score):
        return trained
    progress.say(f"note: the closed form scores {other:.4f} on the data for 'validate', the trained network {score:.4f}: the closed form is kept")
    return solved


def _score(validation: Validation, network: Network) -> float | None:
    with drawing("validate"):
        return validation(network)
