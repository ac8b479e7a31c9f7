"""What a long job says while it works: a spinner on a terminal, plain lines elsewhere, nothing when quiet. It writes to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.status import Status
from rich.text import Text

Show = Callable[[int, float, "float | None", float], None]
SECONDS = 30.0  # between lines where there is no terminal
SMOOTHING = 0.95  # of the loss that is shown


class Progress:
    """Says what is going on.

    Args:
        quiet: say nothing at all.
        stream: where to, by default stderr as it is when something is said.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self._stream = stream
        self._status: Status | None = None
        self._live: Console | None = None

    @property
    def console(self) -> Console:
        return self._live or Console(file=self._stream or sys.stderr, soft_wrap=True, highlight=False)

    def say(self, line: str) -> None:
        """One line that stays."""
        if not self.quiet:
            self.console.print(Text(line))

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """While the block runs: ``what`` with a spinner on a terminal, else one line at its beginning."""
        console = self.console
        if self.quiet or not console.is_terminal:
            self.say(f"{what} ...")
            yield
            return
        with console.status(Text(f"{what} ...")) as self._status:
            try:
                yield
            finally:
                self._status = None

    @contextlib.contextmanager
    def training(self, steps: int) -> Iterator[Show]:
        """While a training of so many steps runs: a bar on a terminal, else a line now and then.

        What it gives is called behind each step with the steps done, their loss, the best score so far (None: there is none yet) and the
        learning rate.
        """
        loss = _Smooth()
        with self.counting("training", "step", steps) as count:
            yield lambda step, value, score, rate: count(step, _told(loss(value), score, rate))

    @contextlib.contextmanager
    def counting(self, work: str, unit: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """While ``total`` units of some work are done: a bar on a terminal, else a line now and then.

        What it gives is called behind each unit with the units done, and a text about the last one.
        """
        if self.quiet or total <= 0:
            yield lambda done, text: None
            return
        console = self.console
        if not console.is_terminal:
            yield self._lines(work, unit, total)
            return
        columns = TextColumn(work), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        with self._alone(), Bars(*columns, console=console, transient=True) as bars:
            row = bars.add_task("", total=total)
            self._live = bars.console  # lines said meanwhile go above the bar
            try:
                yield lambda done, text: bars.update(row, completed=done, description=text)
            finally:
                self._live = None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Without the spinner: a terminal shows one moving thing at a time."""
        status = self._status
        if status is not None:
            status.stop()
        try:
            yield
        finally:
            if status is not None:
                status.start()

    def _lines(self, work: str, unit: str, total: int) -> Callable[[int, str], None]:
        begun = last = time.monotonic()
        first: int | None = None

        def show(done: int, text: str) -> None:
            nonlocal last, first
            now = time.monotonic()
            first = done - 1 if first is None else first
            if now - last >= SECONDS or done == total:
                left = (now - begun) / max(1, done - first) * (total - done)
                self.say(f"{work}: {unit} {done} of {total}, {text}, {left / 60:.1f} min left")
                last = now

        return show


def _told(loss: float, score: float | None, rate: float) -> str:
    return f"loss {loss:.4g}" + ("" if score is None else f", best score {score:.4f}") + f", rate {rate:.2g}"


class _Smooth:
    """A moving average that begins with its first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, value: float) -> float:
        self.value = value if self.value is None else SMOOTHING * self.value + (1 - SMOOTHING) * value
        return self.value
