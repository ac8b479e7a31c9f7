"""Training against the closed form for the same demand: a short training can lose to it, and then the closed form is what is kept."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import TaskError
from ..network.network import Network
from ..progress import Progress
from ..task import Task
from .stream import drawing
from .validation import Validation


def better(task: Task, trained: Network, solve: Callable[[], Network]) -> Network:
    """``trained``, or what ``solve`` makes where validation scores that higher; without data for "validate", ``trained``.

    A closed form that its data does not allow is no reason to lose a training: ``trained`` then stays.
    """
    validation = Validation(task)
    score = validation(trained)
    if score is None:
        return trained
    progress = task.progress or Progress(quiet=True)
    try:
        # What is drawn must not depend on whether the training was resumed.
        with progress.doing("solving, for comparison with what was trained"), drawing("solve"):
            solved = solve()
    except TaskError as error:
        progress.say(f"note: not compared with the closed form: {error}")
        return trained
    other = validation(solved)
    assert other is not None  # as there was data a moment ago
    if other <= score:
        return trained
    progress.say(f"note: the closed form scores {other:.4f} on the data for 'validate', the trained network {score:.4f}: the closed form is kept")
    return solved
