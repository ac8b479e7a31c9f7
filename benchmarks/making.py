"""One making in a fresh process: ``python making.py MODEL METHOD DATA FILE THREADS``. Started by int8.py.

The answer is one line of JSON on the standard output: how long the making took and how much memory it needed. Everything else that the
libraries print goes to the standard error.

The making starts with the model and the libraries in memory. Before the clock starts, the same method makes a file from a tiny model
of the same kind, so that modules that a library imports late count as library and not as making.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Method
from models import SUBJECTS, Start, stored, weight_bytes

from downsize.measure.host import allowed_cpus, memory_use
from downsize.measure.worker import die_with_parent


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, method, data, file, threads = sys.argv[1:]
    # ONNX Runtime starts as many threads as there are CPUs for the process.
    os.sched_setaffinity(0, allowed_cpus()[-int(threads) :])
    torch.set_num_threads(int(threads))
    try:
        answer = run(model, METHODS[method], Path(data), Path(file))
    except Exception as error:  # whatever a peer raises is what is reported of it
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    print(json.dumps(answer), file=answers, flush=True)


def run(model: str, method: Method, data: Path, file: Path) -> dict[str, Any]:
    started = time.perf_counter()
    for module in method.imports:
        importlib.import_module(module)
    imported = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        warm_up = make(method, SUBJECTS[model].tiny(), Path(folder, "tiny.onnx"))
    start = SUBJECTS[model].start()
    start.calibrate = partial(stored, data)
    assert start.model is not None
    weights = weight_bytes(start.model)
    touch(start)
    forward = forward_bytes(start) + weights
    answer = make(method, start, file)
    # The model itself is part of what a making holds: it was there before, so it is added.
    answer["peak_bytes"] = answer.pop("added_bytes") + weights
    times = {"import_seconds": imported - started, "warm_up_seconds": warm_up["seconds"]}
    return answer | times | {"weight_bytes": weights, "forward_bytes": forward}


def touch(start: Start) -> None:
    """Read every weight once: a file that is mapped into memory counts only when it is read."""
    assert start.model is not None
    for tensor in [*start.model.parameters(), *start.model.buffers()]:
        tensor.double().sum().item()


def forward_bytes(start: Start) -> int:
    """The bytes that one run of the float model on one calibration sample takes in torch: what no method that runs it there can go below."""
    inputs, _ = next(iter(start.calibrate()))
    inputs = {name: tensor[:1] for name, tensor in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    assert start.model is not None
    level = settled_memory()
    with torch.no_grad():
        start.model(**inputs) if isinstance(inputs, dict) else start.model(inputs)
    return memory_use().peak - level


def make(method: Method, start: Start, file: Path) -> dict[str, Any]:
    """Seconds on the wall and of CPU time, and the bytes that the process grew by at most."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        os.chdir(folder)  # ONNX Runtime's pre-processing leaves files where it is called
        level = settled_memory()
        busy, begin, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
        note = method.make(start, file, Path(folder))
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        added = memory_use().peak - level
        os.chdir("/")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "load_before": busy, "added_bytes": added, "note": note}


def settled_memory() -> int:
    """Bytes that this process holds after its garbage is gone; its peak counts anew from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is held now (proc(5))
    return memory_use().resident


if __name__ == "__main__":
    main()
