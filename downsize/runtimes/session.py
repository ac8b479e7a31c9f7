"""What every runtime offers: a Runtime says how to write, open and profile a file, and a Session is an open file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArtifactError, TargetError
from .signature import Signature

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


class OperatorTime(NamedTuple):
    """Where the time of one inference goes: one node of the graph as the runtime executes it, after its own fusions."""

    node: str
    operator: str
    seconds: float
    detail: str
    """The data types ("uint8, int8 -> uint8") or the kernel that ran ("brgemm_avx512_i8"), as far as the runtime says."""


class Session:
    """A model file opened in a runtime. Call it with the inputs of the original model and it gives outputs of the same structure.

    >>> session = open_artifact("model.onnx")  # doctest: +SKIP
    >>> session({"input_ids": ids, "attention_mask": mask})  # doctest: +SKIP
    """

    def __init__(self, runtime: str, signature: Signature, run: Run) -> None:
        self.runtime = runtime
        self.signature = signature
        self.input_names = [slot.name for slot in signature.inputs]
        self.input_shapes = [slot.shape for slot in signature.inputs]
        self.input_dtypes = [slot.dtype for slot in signature.inputs]
        self.output_names = list(signature.output_names)
        self._run = run

    def __call__(self, inputs: Any) -> Any:
        """Outputs for one batch: torch tensors when torch tensors went in, else numpy arrays.

        Raises:
            ArtifactError: the inputs do not fit the file, or the runtime fails on them.
        """
        return self.signature.outputs(self.run(self.arrays(inputs)), inputs)

    def arrays(self, inputs: Any) -> list[np.ndarray]:
        """The checked arrays of one batch, in the order that :meth:`run` takes."""
        return self.signature.arrays(inputs)

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Output arrays for checked input arrays, with nothing around the runtime's own call: for timing.

        Raises:
            ArtifactError: the runtime fails.
        """
        try:
            return self._run(arrays)
        except Exception as error:  # every runtime has its own exception classes, some of them bare
            raise ArtifactError(f"{self.runtime} failed while running {self.signature.path}: {error}") from error


@dataclass(frozen=True)
class Runtime:
    """A program that runs model files.

    ``missing()`` says why it cannot be used here and the line that brings it, or None; ``version()`` is its version;
    ``export(network, path)`` writes a Network as its file; ``open(path, threads)`` gives a Session;
    ``profile(path, threads, inputs, runs)`` times every node over ``runs`` inferences of the checked or unchecked ``inputs``;
    ``precisions()`` are the 16-bit types, of "bf16" and "f16", that it computes in here where a file asks for it.
    """

    name: str
    suffix: str
    missing: Callable[[], str | None]
    version: Callable[[], str]
    export: Callable[[Any, str | Path], None]
    open: Callable[[str | Path, int], Session]
    profile: Callable[[str | Path, int, Any, int], list[OperatorTime]]
    precisions: Callable[[], tuple[str, ...]] = tuple


def export_onnx(network: Any, path: str | Path, runtime: str) -> None:
    """Write ``network`` (a Network) as the ONNX file ``path``, with the operators that ``runtime`` has."""
    from ..network.onnx_file import write  # torch is needed only here

    write(network, path, runtime)


def why_missing(package: str, pip: str) -> str | None:
    """Why ``package`` cannot be imported, with the pip line that brings it; None when it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return f"{package} is not installed: {pip}"
        return f"{package} needs {error.name}, which is not installed: {pip}"
    except (ImportError, OSError) as error:
        return f"{package} is installed but does not load ({error}): {pip}"
    return None


def installed_version(package: str) -> str:
    """The installed version of ``package``, or "unknown" when it was not installed as a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def check_threads(threads: int) -> None:
    """Refuse a number of threads that no runtime takes.

    Raises:
        TargetError: it is not a whole number of at least 1.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise TargetError(f"threads is {threads!r}; expected a whole number of at least 1.")


def cannot_open(runtime: str, path: str | Path, error: Exception) -> ArtifactError:
    """The error for a file that ``runtime`` refuses, with the runtime's own words on one line."""
    words = " ".join(str(error).split())
    return ArtifactError(f"{runtime} cannot open {path}: {words[:600]}")
