"""The fresh process that opens and runs model files: ``python -m downsize.measure.worker``. Started by process.py, never by hand.

One request comes as JSON on stdin, one answer goes as JSON on the last line of stdout:

    {"job": "latency" | "memory" | "profile" | "energy", "runtime": name, "threads": n, "paths": [...],
     "inputs": npz file, "structure": of the inputs, ... what the job needs}

An error raised on purpose is answered as {"error": [class name, message]}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..errors import DownsizeError
from ..runtimes import require
from ..structure import unflatten
from .host import memory_use, pin

PAIRS = 40  # blocks of each file that the given seconds are divided into
FEWEST_PAIRS, MOST_PAIRS = 8, 200
LONGEST_BLOCK = 50  # calls
WARM_UP = (3, 100, 0.3)  # at least so many calls, at most so many, else so many seconds

Request = dict[str, Any]
Call = Callable[[], object]


def main() -> None:
    """Answer one request."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints goes to stderr
    request = json.loads(sys.stdin.read())
    try:
        answer: dict[str, Any] = {"cpus": pin(request["threads"])} | JOBS[request["job"]](request)
    except DownsizeError as error:
        answer = {"error": [type(error).__name__, str(error)]}
    print(json.dumps(answer | {"torch": "torch" in sys.modules}), file=answers, flush=True)


def die_with_parent() -> None:
    """Have the system end this process when the one that started it ends, however that ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def latency(request: Request) -> dict[str, Any]:
    """Nanoseconds of every call: {"wall": [file][block][call], "cpu": the same}. The n-th blocks of all files were run side by side."""
    calls = [_call(request, path) for path in request["paths"]]
    repeats = [block_length(_warm_up(call), request["seconds"], len(calls)) for call in calls]
    wall: list[list[list[int]]] = [[] for _ in calls]
    cpu: list[list[list[int]]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(request["seed"]).shuffle
    gc.collect()
    gc.disable()
    stop = time.perf_counter() + request["seconds"]
    while len(wall[0]) < FEWEST_PAIRS or (len(wall[0]) < MOST_PAIRS and time.perf_counter() < stop):
        shuffle(order)
        for index in order:
            times = _block(calls[index], repeats[index])
            wall[index].append(times[0])
            cpu[index].append(times[1])
    return {"wall": wall, "cpu": cpu}


def memory(request: Request) -> dict[str, Any]:
    """Bytes at the peak and at the end, of a process that opened and ran the file; without a path, of one that only could have."""
    require(request["runtime"])
    inputs = _inputs(request)
    for path in request["paths"]:
        call = _call(request, path, inputs)
        for _ in range(request["runs"]):
            call()
    return memory_use()._asdict()


def profile(request: Request) -> dict[str, Any]:
    """The time of every node of the file: {"nodes": [[node, operator, seconds, detail], ...]}."""
    runtime = require(request["runtime"])
    return {"nodes": runtime.profile(request["paths"][0], request["threads"], _inputs(request), request["runs"])}


def energy(request: Request) -> dict[str, Any]:
    """What the machine's energy meters counted while the file ran: {"joules", "runs", "seconds"}."""
    from .energy import joules, read_meters

    call = _call(request, request["paths"][0])
    _warm_up(call)
    start, runs, before = time.perf_counter(), 0, read_meters()
    while time.perf_counter() - start < request["seconds"] or runs < 3:
        call()
        runs += 1
    after, elapsed = read_meters(), time.perf_counter() - start
    return {"joules": joules(before, after), "runs": runs, "seconds": elapsed}


JOBS: dict[str, Callable[[Request], dict[str, Any]]] = {"latency": latency, "memory": memory, "profile": profile, "energy": energy}


def block_length(seconds_per_call: float, seconds: float, files: int) -> int:
    """How many timed calls make a block, so that all files get ``PAIRS`` blocks in ``seconds``."""
    return max(1, min(LONGEST_BLOCK, int(seconds / (PAIRS * files) / seconds_per_call) - 1))


def _inputs(request: Request) -> Any:
    with np.load(request["inputs"], allow_pickle=False) as file:
        return unflatten(request["structure"], [file[f"arr_{i}"] for i in range(len(file.files))])


def _call(request: Request, path: str, inputs: Any = None) -> Call:
    session = require(request["runtime"]).open(path, request["threads"])
    return partial(session.run, session.arrays(_inputs(request) if inputs is None else inputs))


def _warm_up(call: Call) -> float:
    """Seconds of the fastest of the first calls."""
    fewest, most, limit = WARM_UP
    start, fastest, count = time.perf_counter(), float("inf"), 0
    while count < fewest or (count < most and time.perf_counter() - start < limit):
        begin = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - begin)
        count += 1
    return fastest


def _block(call: Call, repeats: int) -> tuple[list[int], list[int]]:
    """Nanoseconds on the wall and of CPU time (all threads) of ``repeats`` calls in a row."""
    if repeats > 1:
        call()  # not timed: it finds the other file's data in the caches
    wall, cpu = [], []
    for _ in range(repeats):
        cpu_start = time.process_time_ns()
        start = time.perf_counter_ns()
        call()
        end = time.perf_counter_ns()
        cpu.append(time.process_time_ns() - cpu_start)
        wall.append(end - start)
    return wall, cpu


if __name__ == "__main__":
    main()
