"""What a training says: lines where there is no terminal, a bar on one, nothing when quiet."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from downsize import progress as module
from downsize.progress import Progress


class Terminal(Progress):
    """Writes to a terminal that is none."""

    def __init__(self, stream: StringIO) -> None:
        super().__init__(stream=stream)
        self.one = Console(file=stream, force_terminal=True, width=120, highlight=False)

    @property
    def console(self) -> Console:
        return self._live or self.one


def told(progress: Progress, steps: int = 4, begun: int = 0) -> None:
    with progress.training(steps) as show:
        for step in range(begun + 1, steps + 1):
            show(step, 2.0 / step, None if step < 3 else 0.5, 1e-3)


def test_lines_without_a_terminal(monkeypatch):
    stream, now = StringIO(), iter(range(0, 1000, 20))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    told(Progress(stream=stream), steps=7)
    lines = stream.getvalue().splitlines()
    # 20 seconds a step, a line every 30 or more, and one at the end: 2, 4, 6, 7
    assert [re.findall(r"step (\d) of 7", line) for line in lines] == [["2"], ["4"], ["6"], ["7"]]
    assert lines[0] == "training: step 2 of 7, loss 1.95, rate 0.001, 1.7 min left"  # 0.95 * 2 + 0.05 * 1; 5 steps of 20 s
    assert lines[1].endswith("best score 0.5000, rate 0.001, 1.0 min left") and lines[-1].endswith("0.0 min left")


def test_time_left_counts_only_the_steps_made_now(monkeypatch):
    stream, now = StringIO(), iter(range(0, 1000, 60))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    told(Progress(stream=stream), steps=12, begun=10)
    assert "step 11 of 12" in stream.getvalue() and "1.0 min left" in stream.getvalue().splitlines()[0]


def test_a_bar_on_a_terminal_that_goes_away():
    stream = StringIO()
    progress = Terminal(stream)
    with progress.doing("building finetune()"):
        with progress.training(4) as show:
            show(1, 2.0, None, 1e-3)
            progress.say("step 1 of 4: score 0.5000, best 0.5000")
            show(4, 1.0, 0.5, 1e-3)
        progress.say("done")
    text = stream.getvalue()
    assert "━" in text and "4/4" in text
    assert "loss 1.95, best score 0.5000, rate 0.001" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\nstep 1 of 4: score 0.5000, best 0.5000\n" in plain.replace("\r", "\n") and "done" in plain
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again


def test_a_bar_is_taken_down_behind_an_error():
    stream = StringIO()
    progress = Terminal(stream)
    with pytest.raises(KeyboardInterrupt), progress.training(4) as show:
        show(1, 2.0, None, 1e-3)
        raise KeyboardInterrupt
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    assert progress._live is None


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_and_no_steps_say_nothing(terminal):
    stream = StringIO()
    quiet = Terminal(stream) if terminal else Progress(stream=stream)
    told(quiet, steps=0)
    quiet.quiet = True
    told(quiet)
    quiet.say("anything")
    assert stream.getvalue() == ""
