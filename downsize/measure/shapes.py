"""The measured latency of layers' shapes on this machine, kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtimes import OperatorTime, require
from ..runtimes.session import check_threads
from .host import host
from .process import label

if TYPE_CHECKING:
    from ..pruning.latency import LayerShape

LAYERS, ELEMENTS = 48, 2**26  # at most so many layers, and about so many elements of their operands, in one file
# How often a file is opened and profiled; the least of a layer's times counts, because a busy machine only ever makes it slower.
ROUNDS = 10
# What a runtime puts around a lone layer: changes of memory layout, which in a network the neighbours have already, and views.
AROUND = ("Reorder", "Reshape")
VERSION = 2


class LatencyTable:
    """The time of layers in ``runtime`` on ``threads`` threads of this machine: a :class:`~downsize.pruning.latency.Clock`.

    Layers are written side by side into one file, so that they take turns, each finding what the others left in the caches as in
    a network, and the runtime's own profile says how long each took, without the overhead of the call. A layer's time is the least of
    ten rounds. Changes of memory layout at a layer's ends are left out. What was measured is kept in ``folder`` (default: ``downsize`` in
    the user's cache folder), by CPU, runtime, its version and threads; a folder that cannot be written is no error.

    Raises:
        SpecError, RuntimeMissing: the runtime is unknown or not installed. TargetError: ``threads`` is no positive whole number.
    """

    def __init__(self, runtime: str = "onnxruntime", threads: int = 1, folder: str | Path | None = None) -> None:
        check_threads(threads)
        self.runtime, self.threads = require(runtime), threads
        self.where = {"version": VERSION, "cpu": host().cpu, "features": host().features, "runtime": label(runtime), "threads": threads}
        name = hashlib.sha256(json.dumps(self.where).encode()).hexdigest()[:16]
        self.path = (_cache_folder() if folder is None else Path(folder)) / f"layers-{name}.json"
        self.known = self._read()

    def milliseconds(self, shapes: Sequence[LayerShape]) -> list[float]:
        """The time of each layer in milliseconds; those not known yet are measured, about a quarter of a second each.

        Raises:
            ExportError, ArtifactError: a layer cannot be written or run.
        """
        missing = {str(shape): shape for shape in shapes if str(shape) not in self.known}
        for group in _groups(list(missing.values())):
            self.known |= dict(zip(map(str, group), self._measure(group), strict=True))
            self._write()
        return [self.known[str(shape)] for shape in shapes]

    def _measure(self, shapes: Sequence[LayerShape]) -> list[float]:
        """Milliseconds of each layer. When the runtime's names do not tell them apart, they are measured in smaller files."""
        found = [layer_times(ran, len(shapes)) for ran in self._profiles(shapes)]
        if found[0] is None:
            half = len(shapes) // 2
            return [*self._measure(shapes[:half]), *self._measure(shapes[half:])]
        return [min(seconds) * 1e3 for seconds in zip(*filter(None, found), strict=True)]

    def _profiles(self, shapes: Sequence[LayerShape]) -> list[list[OperatorTime]]:
        """What ran in each round; one round is enough to see that the names do not tell the layers apart."""
        import torch

        from ..pruning.latency import side_by_side, values_for

        generator = torch.Generator().manual_seed(1)
        inputs = tuple(values_for(operand, generator) for shape in shapes for operand in shape.operands if not operand.constant)
        with tempfile.TemporaryDirectory(prefix="downsize-") as folder:
            path = Path(folder, f"layers{self.runtime.suffix}")
            self.runtime.export(side_by_side(shapes), path)
            rounds = [self.runtime.profile(path, self.threads, inputs, 1)]
            for _ in range(ROUNDS - 1 if layer_times(rounds[0], len(shapes)) else 0):
                rounds.append(self.runtime.profile(path, self.threads, inputs, 1))
            return rounds

    def _read(self) -> dict[str, float]:
        """What is in the file; nothing when there is none, or it is damaged."""
        try:
            saved = json.loads(self.path.read_text())
            times = {str(key): float(value) for key, value in saved["milliseconds"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}
        return {key: value for key, value in times.items() if isfinite(value) and value >= 0}

    def _write(self) -> None:
        self.known = self._read() | self.known  # another process may have measured others meanwhile
        text = json.dumps({"where": self.where, "milliseconds": self.known}, indent=1)
        temporary = ""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, self.path)
            return
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def layer_times(ran: Sequence[OperatorTime], layers: int) -> list[float] | None:
    """The seconds of each of ``layers`` layers side by side, from what the runtime ran, which it names by module or by output.

    None when a node has the name of no layer, so that its time would be lost. Of a lone layer everything is its own.
    """
    seconds = [0.0] * layers
    for item in ran:
        if any(kind in item.operator for kind in AROUND):
            continue
        found = re.search(r"(?<![0-9A-Za-z])(?:layers\.|output)(\d+)(?![0-9A-Za-z])", item.node)
        if found is None and layers > 1:
            return None
        seconds[int(found[1]) if found and layers > 1 else 0] += item.seconds
    return seconds


def _groups(shapes: Sequence[LayerShape]) -> Iterator[list[LayerShape]]:
    """Parts small enough for one file and for memory, in order."""
    group: list[LayerShape] = []
    for shape in shapes:
        if group and (len(group) == LAYERS or sum(one.elements for one in group) + shape.elements > ELEMENTS):
            yield group
            group = []
        group.append(shape)
    if group:
        yield group


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "downsize"
    except RuntimeError:  # no home folder
        return Path(tempfile.gettempdir()) / f"downsize-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
