"""The runtimes: programs that run the files we make. Importing this imports none of them, nor torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError, RuntimeMissing, SpecError, nearest
from . import onnxruntime, openvino
from .session import OperatorTime, Runtime, Session

RUNTIMES: dict[str, Runtime] = {"onnxruntime": onnxruntime.RUNTIME, "openvino": openvino.RUNTIME}

__all__ = ["RUNTIMES", "OperatorTime", "Runtime", "Session", "open_artifact", "require"]


def require(name: str) -> Runtime:
    """The runtime called ``name``, ready for use.

    Raises:
        SpecError: there is no runtime of that name.
        RuntimeMissing: it is not installed or does not load here; the message has the line that brings it.
    """
    if name not in RUNTIMES:
        raise SpecError(f"There is no runtime {name!r}; {nearest(name, RUNTIMES)}")
    why = RUNTIMES[name].missing()
    if why is not None:
        raise RuntimeMissing(f"The runtime {name!r} cannot be used: {why}")
    return RUNTIMES[name]


def open_artifact(path: str | Path, runtime: str | None = None, threads: int = 1) -> Session:
    """Open the model file at ``path``, in the runtime called ``runtime`` or else the first one here that reads such files.

    Raises:
        ArtifactError: no runtime reads such a file, or it is missing, damaged or cannot be run.
        SpecError, RuntimeMissing: as :func:`require`.
        TargetError: ``threads`` is not a positive whole number.
    """
    suffix = Path(path).suffix
    readers = [name for name, known in RUNTIMES.items() if known.suffix == suffix]
    if not readers or (runtime in RUNTIMES and runtime not in readers):
        known = ", ".join(sorted({known.suffix for known in RUNTIMES.values()}))
        raise ArtifactError(f"{path} ends in {suffix!r}; {runtime or 'the runtimes'} read(s) {known}: check the path.")
    if runtime is None:
        runtime = next((name for name in readers if RUNTIMES[name].missing() is None), readers[0])
    return require(runtime).open(path, threads)
