"""What a long job says while it works: a spinner on a terminal, plain lines elsewhere, nothing when quiet. It writes to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.text import Text


class Progress:
    """Says what is going on.

    Args:
        quiet: say nothing at all.
        stream: where to, by default stderr as it is when something is said.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self._stream = stream

    @property
    def console(self) -> Console:
        return Console(file=self._stream or sys.stderr, soft_wrap=True, highlight=False)

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
        with console.status(Text(f"{what} ...")):
            yield
