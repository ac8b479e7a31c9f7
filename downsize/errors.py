"""Every error that downsize raises on purpose.

One root, :class:`DownsizeError`. A message says what came, what was expected, and the mend, so that it can be acted on without
reading the source. Bad input is refused before any long work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DownsizeError(Exception):
    """Root of all errors raised on purpose; the command line prints its message without a traceback."""


class CaptureError(DownsizeError):
    """The model cannot become a Network: the operator, the user's source line and the way out are in the message."""


class ExportError(DownsizeError):
    """A Network cannot be written for a runtime."""


class NetworkFileError(DownsizeError):
    """A saved network is damaged, forged, or of another version."""


class TaskError(DownsizeError):
    """The model, data or score that the user brought cannot be used."""


class TargetError(DownsizeError):
    """A limit or a device property makes no sense."""


class SpecError(DownsizeError):
    """A recipe, YAML file or option names something that does not exist or has a wrong value."""


class AllocationError(DownsizeError):
    """No choice of widths, ranks, bits or sparsities meets all limits, or the tables that describe them do not fit together."""


class CutError(DownsizeError):
    """These positions of a network's tensors cannot be cut."""


class TrainingError(DownsizeError):
    """Training broke down. ``network``: the last good state, if there is one."""

    network: Any = None


class RuntimeMissing(DownsizeError):
    """A runtime is not installed or does not work here; the message has the line that brings it."""


class ArtifactError(DownsizeError):
    """A model file cannot be opened or run, or the inputs do not fit it."""


class RunError(DownsizeError):
    """A run folder belongs to another run, is damaged, or cannot be written."""


class MeasureError(DownsizeError):
    """A measurement could not be taken."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown word: the nearest known one, or all of them.

    >>> nearest("quantise", ["quantize", "prune"])
    "did you mean 'quantize'? Known: prune, quantize."
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."
