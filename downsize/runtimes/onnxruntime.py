"""ONNX Runtime on the CPU."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .session import OperatorTime, Runtime, Session, cannot_open, check_threads, export_onnx, installed_version, why_missing
from .signature import Signature

NAME = "onnxruntime"
PIP = "pip install onnxruntime"
CONTAINERS = ("If", "Loop", "Scan")  # their time is that of the nodes inside them, which are listed too


def missing() -> str | None:
    """Why ONNX Runtime cannot be used here, or None."""
    _no_telemetry()
    return why_missing(NAME, PIP)


def version() -> str:
    """The installed version."""
    return installed_version(NAME)


def open_session(path: str | Path, threads: int = 1) -> Session:
    """Open the ONNX file at ``path`` on ``threads`` threads: operators one after the other, idle threads asleep.

    Raises:
        ArtifactError: the file is missing, damaged, or has something this ONNX Runtime cannot run.
        TargetError: ``threads`` is not a positive whole number.
    """
    return _open(path, threads, profile_prefix=None)[0]


def profile(path: str | Path, threads: int, inputs: Any, runs: int) -> list[OperatorTime]:
    """The time of every node, in execution order: the median over ``runs`` inferences (after three to warm up) of its time in one.

    Raises:
        ArtifactError: as :func:`open_session`, or the inputs do not fit.
    """
    warm_up = 3
    with tempfile.TemporaryDirectory(prefix="downsize-") as folder:
        session, inference = _open(path, threads, profile_prefix=str(Path(folder, "profile")))
        arrays = session.arrays(inputs)
        for _ in range(warm_up + runs):
            session.run(arrays)
        events = json.loads(Path(inference.end_profiling()).read_text())
    return _operator_times(events, warm_up)


def _open(path: str | Path, threads: int, profile_prefix: str | None) -> tuple[Session, Any]:
    check_threads(threads)
    signature = Signature.read(path)
    _no_telemetry()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what is wrong comes as an exception; no second copy on stderr
    # Threads that spin while they wait steal time from whatever else runs, and double the latency of a busy machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    try:
        inference: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no class below Exception
        raise cannot_open(NAME, path, error) from error
    _give_back_memory()
    input_names, output_names = [slot.name for slot in signature.inputs], list(signature.output_names)

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return inference.run(output_names, dict(zip(input_names, arrays, strict=True)))

    return Session(NAME, signature, run), inference


def _give_back_memory() -> None:
    """Return to the system what loading a file took and freed: where weights are decoded then, several times their size.

    The C library keeps it otherwise; those that have no such call need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _no_telemetry() -> None:
    """Keep ONNX Runtime's usage reports off, unless the user has switched them on.

    From 1.31 on, importing it otherwise starts a thread that reports to its maker and keeps its state in the home folder. It reads the
    variable at import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _operator_times(events: list[dict[str, Any]], warm_up: int) -> list[OperatorTime]:
    """Node times from the events of ONNX Runtime's trace: microseconds, one "model_run" event around the nodes of each inference."""
    inferences = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[warm_up:]
    nodes = sorted((e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")), key=lambda e: e["ts"])
    if not inferences:
        raise ArtifactError("The trace of onnxruntime has no inference in it; expected at least one.")
    totals: defaultdict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0] * len(inferences))
    current = 0
    for event in nodes:
        while current < len(inferences) and event["ts"] > inferences[current][1]:
            current += 1
        if current == len(inferences) or event["ts"] < inferences[current][0] or event["args"]["op_name"] in CONTAINERS:
            continue
        name = event["name"].removesuffix("_kernel_time")
        key = (name or f"node {event['args'].get('node_index', '?')}", event["args"]["op_name"], _types(event["args"]))
        totals[key][current] += event["dur"] * 1e-6
    return [OperatorTime(node, operator, median(seconds), detail) for (node, operator, detail), seconds in totals.items()]


def _types(args: dict[str, Any]) -> str:
    sides = [", ".join(next(iter(item), "") for item in args.get(key, [])) for key in ("input_type_shape", "output_type_shape")]
    return " -> ".join(sides)


RUNTIME = Runtime(NAME, ".onnx", missing, version, partial(export_onnx, runtime=NAME), open_session, profile)
