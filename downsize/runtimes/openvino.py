"""OpenVINO on the CPU: reads the same ONNX files, without a conversion step."""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .session import OperatorTime, Runtime, Session, cannot_open, check_threads, export_onnx, installed_version, why_missing
from .signature import Signature

NAME = "openvino"
PIP = 'pip install "downsize[openvino]"'


def missing() -> str | None:
    """Why OpenVINO cannot be used here, or None."""
    with _NoTelemetry():
        return why_missing(NAME, PIP)


def version() -> str:
    """The installed version."""
    return installed_version(NAME)


def open_session(path: str | Path, threads: int = 1) -> Session:
    """Open the ONNX file at ``path`` on ``threads`` pinned threads, one inference at a time.

    Float layers are computed in float32, or in 16 bits where the file asks for that and this CPU has such products.

    Raises:
        ArtifactError: the file is missing, damaged, or has something this OpenVINO cannot run.
        TargetError: ``threads`` is not a positive whole number.
    """
    return _open(path, threads, count=False)[0]


def profile(path: str | Path, threads: int, inputs: Any, runs: int) -> list[OperatorTime]:
    """The time of every node that ran, in execution order: the median over ``runs`` inferences, after three to warm up.

    Raises:
        ArtifactError: as :func:`open_session`, or the inputs do not fit.
    """
    session, request = _open(path, threads, count=True)
    arrays = session.arrays(inputs)
    seconds: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for turn in range(3 + runs):
        session.run(arrays)
        for node in request.get_profiling_info() if turn >= 3 else ():
            if node.status.name == "EXECUTED":
                seconds[node.node_name, node.node_type, node.exec_type].append(node.real_time.total_seconds())
    return [OperatorTime(node, operator, median(times), kernel) for (node, operator, kernel), times in seconds.items()]


def _open(path: str | Path, threads: int, count: bool) -> tuple[Session, Any]:
    check_threads(threads)
    signature = Signature.read(path)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": True,
        # By default OpenVINO computes float32 layers in bfloat16 where the CPU can, which is another model, unless the file asks for it.
        "INFERENCE_PRECISION_HINT": signature.precision if signature.precision in precisions() else "f32",
        # By default it rounds what goes into layers with packed weights to 8 bits, which is another model, too.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "CACHE_DIR": "",
        "PERF_COUNT": count,
    }
    try:
        compiled = _core().compile_model(str(path), "CPU", options)
    except Exception as error:
        raise cannot_open(NAME, path, error) from error
    request = compiled.create_infer_request()
    inputs = _positions(compiled.inputs, [slot.name for slot in signature.inputs], path)
    outputs = _positions(compiled.outputs, list(signature.output_names), path)

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        results = request.infer(dict(zip(inputs, arrays, strict=True)), share_inputs=True, share_outputs=False)
        return [results[position] for position in outputs]

    return Session(NAME, signature, run), request


def precisions() -> tuple[str, ...]:
    """The 16-bit types that OpenVINO multiplies in on this CPU, of "bf16" and "f16"."""
    names = {"BF16": "bf16", "FP16": "f16"}
    return tuple(names[found] for found in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") if found in names)


def _positions(ports: list[Any], names: list[str], path: str | Path) -> list[int]:
    """Where each of ``names`` stands among the compiled model's inputs or outputs."""
    known = [port.get_names() for port in ports]
    found = [next((i for i, aliases in enumerate(known) if name in aliases), None) for name in names]
    lost = [name for name, position in zip(names, found, strict=True) if position is None]
    if lost:
        raise ArtifactError(f"{NAME} lost {lost} of {path} while it compiled it; it has {[sorted(aliases) for aliases in known]}.")
    return [position for position in found if position is not None]


@cache
def _core() -> Any:
    with _NoTelemetry():
        import openvino

        return openvino.Core()


class _NoTelemetry:
    """While it is entered, OpenVINO's usage reporter looks as if it were not installed.

    Importing openvino sends an event over the network and writes into the home folder unless its reporter, a package of its own, is
    absent: it has a path for that, which this takes. What the user imported before is left as it is.
    """

    reporter = "openvino_telemetry"

    def __enter__(self) -> None:
        self.before: dict[str, ModuleType] = {self.reporter: sys.modules[self.reporter]} if self.reporter in sys.modules else {}
        sys.modules[self.reporter] = None  # type: ignore[assignment]  # the import system's way to say: not to be found

    def __exit__(self, *_: object) -> None:
        del sys.modules[self.reporter]
        sys.modules.update(self.before)


RUNTIME = Runtime(NAME, ".onnx", missing, version, partial(export_onnx, runtime=NAME), open_session, profile, precisions)
