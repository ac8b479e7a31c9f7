"""One making in a fresh process: ``python pruning_making.py MODEL METHOD KIND LEFT DATA FILE THREADS``. Started by pruning.py.

The answer is one line of JSON on the standard output: what was made and what it took. What the libraries print goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import stored
from pruning_methods import METHODS
from pruning_models import SUBJECTS, Amount

from downsize.measure.host import memory_use
from downsize.measure.worker import die_with_parent
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.onnx_file import write

LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, method, kind, left, data, file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        answer = run(model, method, Amount(kind, float(left)), Path(data), Path(file))
    except Exception as error:  # whatever a peer raises is what is reported of it
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    print(json.dumps(answer), file=answers, flush=True)


def run(model: str, method: str, amount: Amount, data: Path, file: Path) -> dict[str, Any]:
    subject = SUBJECTS[model]
    start = subject.start()
    start.calibrate = partial(stored, data)
    begin, cpu, level = time.perf_counter(), time.process_time(), memory_use().resident
    network = METHODS[method].make(start, subject, amount)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    added = memory_use().peak - level
    write(network, file)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "added_bytes": added, **size_of(network, subject.sample())}


def size_of(network: Network, inputs: Any) -> dict[str, int]:
    """MACs of one run, those of them that are linear layers' and convolutions', and parameters."""
    cost = count(network, inputs)
    return {"macs": cost.macs, "layer_macs": sum(row.macs for row in cost.rows if row.operator in LAYERS), "parameters": cost.parameters}


if __name__ == "__main__":
    main()
