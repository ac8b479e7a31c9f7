"""Size, latency and memory of a model file, each taken in a fresh process that has only what a deployed program would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ArtifactError, DownsizeError, MeasureError, RuntimeMissing, SpecError, TargetError
from ..facts import Artifact, Measurement
from ..numerics.agreement import bootstrap
from ..runtimes import RUNTIMES, OperatorTime
from ..runtimes.onnx_header import read_header
from ..runtimes.session import check_threads
from ..runtimes.signature import as_array
from ..structure import flatten
from .host import host

SEED = 20140209
RESAMPLES = 1000
MEMORY_REPEATS, MEMORY_RUNS = 3, 5
BUSY = 1.15  # wall time over CPU time of one thread from which on the machine is called busy
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ERRORS = {error.__name__: error for error in (ArtifactError, MeasureError, RuntimeMissing, SpecError, TargetError)}


def size(path: str | Path) -> Measurement:
    """Bytes of the model file, with those of the files beside it that hold some of its weights.

    Raises:
        ArtifactError: the file cannot be read, or is an ONNX file that is damaged.
    """
    artifact = Artifact.of(path, "")
    sides = read_header(path).side_files if Path(path).suffix == ".onnx" else ()
    try:
        total = artifact.bytes + sum(side.stat().st_size for side in sides)
    except OSError as error:
        raise ArtifactError(f"{path} keeps weights in {error.filename}, which cannot be read: {error.strerror}; put it there.") from None
    note = f"with the weights in {', '.join(side.name for side in sides)}" if sides else None
    return Measurement("size", total, "bytes", sha256=artifact.sha256, note=note)


def latency(
    path: str | Path,
    inputs: Any,
    runtime: str = "onnxruntime",
    threads: int = 1,
    baseline: str | Path | None = None,
    seconds: float = 3.0,
) -> dict[str, Measurement]:
    """The time of one call with ``inputs``, in seconds, in a fresh process kept to ``threads`` CPUs.

    With a ``baseline`` file, both are opened in one process and run in turn, in short blocks of random order, so that a disturbance of
    the machine meets both; the ratio is the median over the pairs of neighbouring blocks. All intervals are 95 % percentile bootstrap
    intervals (Efron, 1979) over whole blocks, because calls in a block are not independent. It takes at most ``seconds`` after
    the warm-up, but no fewer than 8 calls of each file.

    Returns:
        "latency" (median), "latency_p90", "cpu_latency" (CPU time of all threads; less disturbed by a busy machine), and with a
        baseline "baseline_latency", "latency_ratio" and "cpu_latency_ratio" (the file's over the baseline's).

    Raises:
        ArtifactError: a file cannot be opened or run, or the inputs do not fit.
        SpecError, RuntimeMissing: the runtime is unknown or not installed.
        MeasureError: ``seconds`` is not positive, the process died, or it loaded torch.
    """
    if not 0 < seconds < float("inf"):
        raise MeasureError(f"seconds is {seconds!r}; expected a positive number of seconds to measure for.")
    paths = [path] if baseline is None else [path, baseline]
    answer = ask("latency", paths, inputs, runtime, threads, seconds=float(seconds), seed=SEED)
    wall, cpu = ([np.array(file) * 1e-9 for file in answer[clock]] for clock in ("wall", "cpu"))
    facts = Measurement("", 0.0, "seconds", host=host(), runtime=label(runtime), sha256=Artifact.of(path, runtime).sha256)
    found = summarize(wall, cpu, facts)
    note = _note(wall, cpu, threads, answer["cpus"])
    found = {name: replace(measurement, note=note) for name, measurement in found.items()}
    if baseline is not None:
        found["baseline_latency"] = replace(found["baseline_latency"], sha256=Artifact.of(baseline, runtime).sha256)
    return found


def summarize(wall: Sequence[np.ndarray], cpu: Sequence[np.ndarray], facts: Measurement) -> dict[str, Measurement]:
    """The measurements from the seconds of every call: one array [blocks, calls] for the file and, if there is one, the baseline.

    ``facts`` has what is the same for all: file, host, runtime.
    """
    statistics = {"latency": "seconds", "latency_p90": "seconds", "cpu_latency": "seconds"}
    if len(wall) == 2:
        statistics |= {"baseline_latency": "seconds", "latency_ratio": "ratio", "cpu_latency_ratio": "ratio"}
        ratios = [np.median(clock[0], axis=1) / np.median(clock[1], axis=1) for clock in (wall, cpu)]

    def values(blocks: np.ndarray) -> list[float]:
        own = [np.median(wall[0][blocks]), np.quantile(wall[0][blocks], 0.9), np.median(cpu[0][blocks])]
        paired = [np.median(wall[1][blocks]), *(np.median(ratio[blocks]) for ratio in ratios)] if len(wall) == 2 else []
        return [float(value) for value in own + paired]

    blocks = len(wall[0])
    intervals = bootstrap(values, blocks, samples=RESAMPLES, seed=SEED) or [(None, None)] * len(statistics)
    counts = {"baseline_latency": wall[-1].size, "latency_ratio": blocks, "cpu_latency_ratio": blocks}
    return {
        name: replace(facts, name=name, unit=unit, value=value, low=low, high=high, samples=counts.get(name, wall[0].size))
        for (name, unit), value, (low, high) in zip(statistics.items(), values(np.arange(blocks)), intervals, strict=True)
    }


def memory(path: str | Path, inputs: Any, runtime: str = "onnxruntime", threads: int = 1) -> Measurement:
    """The memory that opening the file and running it on ``inputs`` adds to a process, in bytes: the median of three.

    It is the peak resident memory of a fresh process that does so, less that of one that only imports the runtime and numpy and loads
    the inputs.

    Raises:
        ArtifactError, SpecError, RuntimeMissing, MeasureError: as :func:`latency`.
    """
    whole = [ask("memory", [path], inputs, runtime, threads, runs=MEMORY_RUNS) for _ in range(MEMORY_REPEATS)]
    empty = [ask("memory", [], inputs, runtime, threads, runs=MEMORY_RUNS) for _ in range(MEMORY_REPEATS)]
    added = [full["peak"] - bare["peak"] for full, bare in zip(whole, empty, strict=True)]
    resident = median(full["resident"] for full in whole) - median(bare["resident"] for bare in empty)
    note = (
        f"{whole[0]['source']}; {min(added) / 1e6:.1f} to {max(added) / 1e6:.1f} MB in {MEMORY_REPEATS} processes, "
        f"{resident / 1e6:.1f} MB still held at the end; the process without the file: {median(bare['peak'] for bare in empty) / 1e6:.1f} MB"
    )
    sha256 = Artifact.of(path, runtime).sha256
    value = max(0, median(added))  # a tiny file may fit into memory that the imports left free
    return Measurement("memory", value, "bytes", samples=MEMORY_REPEATS, sha256=sha256, host=host(), runtime=label(runtime), note=note)


def per_operator(path: str | Path, inputs: Any, runtime: str = "onnxruntime", threads: int = 1, runs: int = 20) -> list[OperatorTime]:
    """The time of every node of the file as the runtime executes it: (node, operator, seconds of one call, kernel or data types).

    Nodes that the runtime has fused into another or removed are not listed; ONNX Runtime calls a fused node after the last one that went
    into it, at times with an ending such as "_nchwc". The sum is somewhat above the latency, because the runtime's own clock
    runs along.

    Raises:
        ArtifactError, SpecError, RuntimeMissing, MeasureError: as :func:`latency`.
    """
    answer = ask("profile", [path], inputs, runtime, threads, runs=runs)
    return [OperatorTime(*node) for node in answer["nodes"]]


def label(runtime: str) -> str:
    """The runtime with its version, as a measurement names it: "onnxruntime 1.31.1"."""
    return f"{runtime} {RUNTIMES[runtime].version()}"


def ask(job: str, paths: Sequence[str | Path], inputs: Any, runtime: str, threads: int, **options: Any) -> dict[str, Any]:
    """The answer of a fresh worker process to one request (see worker.py). The worker is ended with whatever interrupts this.

    Raises:
        DownsizeError: the one that the worker met, of the same class.
        MeasureError: the worker died, or it has torch in it, so that nothing it measured is that of a deployed program.
    """
    check_threads(threads)
    leaves, structure = flatten(inputs)
    arrays = [as_array(leaf) for leaf in leaves]
    with tempfile.TemporaryDirectory(prefix="downsize-") as folder:
        file = Path(folder, "inputs.npz")
        np.savez(file, *arrays)
        request = {"job": job, "runtime": runtime, "threads": threads, "inputs": str(file), "structure": structure}
        request |= {"paths": [str(Path(path).absolute()) for path in paths], **options}
        code, output, errors = _start(json.dumps(request), threads, folder)
    what = f"The process that measures {job} of {', '.join(map(str, paths)) or 'nothing'} in {runtime}"
    try:
        answer = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        raise MeasureError(f"{what} {death(code)}. Its last words: {_tail(errors)}") from None
    if "error" in answer:
        name, message = answer["error"]
        raise ERRORS.get(name, DownsizeError)(message)
    if answer["torch"]:
        raise MeasureError(f"{what} has imported torch, which a deployed program does not have: find what imports it and remove it.")
    return answer


def _start(request: str, threads: int, folder: str) -> tuple[int, str, str]:
    """Run a worker in ``folder``, where no module of the user's can be imported by mistake: its exit code, stdout and stderr."""
    here = str(Path(__file__).parents[2])
    known = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"PYTHONPATH": os.pathsep.join(known), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "downsize.measure.worker"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", cwd=folder, env=environment)
    try:
        output, errors = process.communicate(request)
    except BaseException:  # Ctrl-C above all
        process.kill()
        process.wait()
        raise
    return process.returncode, output, errors


def death(code: int) -> str:
    """How a process ended that gave no answer, from its exit code."""
    if code >= 0:
        return f"ended with exit code {code} and no answer"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    reason = ": most likely the system ran out of memory, so try a smaller batch or close other programs" if name == "SIGKILL" else ""
    return f"was ended by {name}{reason}"


def _tail(errors: str) -> str:
    lines = [line.strip()[:200] for line in errors.splitlines() if line.strip()]
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)  # the cause, before a long stack
    kept = lines[-12:] if fatal is None else lines[max(0, fatal - 3) : fatal + 9]
    return " | ".join(kept) or "none"


def _note(wall: Sequence[np.ndarray], cpu: Sequence[np.ndarray], threads: int, cpus: Sequence[int]) -> str:
    where = f"on CPU {', '.join(map(str, cpus))}" if cpus else "not kept to CPUs, which this system cannot do"
    if 0 < len(cpus) < threads:
        where += f", fewer than the {threads} threads"
    parts = [f"{wall[0].shape[0]} blocks of {' and '.join(str(file.shape[1]) for file in wall)} calls {where}"]
    parts.append(f"CPU time {' and '.join(f'{np.median(file) * 1e3:.4g} ms' for file in cpu)}")
    excess = max(float(w.sum() / c.sum()) for w, c in zip(wall, cpu, strict=True))
    if threads == 1 and excess > BUSY:
        parts.append(f"the machine was busy: together the calls took {excess:.2f} times their CPU time")
    return "; ".join(parts)
