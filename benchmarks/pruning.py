"""Structured pruning side by side: downsize, its own controls, and Torch-Pruning on five models, in one run and without training.

    python benchmarks/pruning.py                                      # everything
    python benchmarks/pruning.py --model lite0 --method downsize --method torch-pruning
    python benchmarks/pruning.py --quick                              # little data and short timings: to see that it works, not for numbers
    python benchmarks/pruning.py --show runs/pruning/results.json --markdown

Every network is made in its own process from the same torch model and the same unlabelled calibration data, written by downsize as an ONNX
file, and that file is what is judged and timed. What is measured, and how, stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from int8 import ROOT, WIDTH, Row, attempt, commit, plain
from models import Batches, Start, store
from pruning_methods import BASELINE, METHODS, OURS
from pruning_models import SUBJECTS, Amount, Subject, recorded
from pruning_tables import tables
from rich.console import Console
from tables import markdown, to_rich

from downsize.facts import Artifact, made_by
from downsize.measure import host, latency, size
from downsize.measure.process import THREAD_VARIABLES, death
from downsize.runtimes import open_artifact

RUNTIME_NAMES = ("onnxruntime", "openvino")
LATENCY_SECONDS, QUICK_SECONDS = 4.0, 0.5
QUICK_BATCHES = 4
TIME_LIMIT = 3600  # seconds, for one making
PEERS = ("torch-pruning", "transformers", "scipy")


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.show:
        results = json.loads(Path(options.show).read_text())
    else:
        results = run(options, console)
        console.print(f"written: {options.out}")
    for table in tables(results):
        print(markdown(table), end="\n\n") if options.markdown else console.print(to_rich(table))
    return 1 if any("error" in row for row in results["rows"] if row["method"] == OURS) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", choices=SUBJECTS, help="which models (all)")
    parser.add_argument("--method", action="append", choices=METHODS, help="which methods (all); the dense network is always made")
    parser.add_argument("--out", default="runs/pruning/results.json", help="the results; the model files are put beside them (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a making (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="little data and short timings")
    parser.add_argument("--untimed", action="store_true", help="measure no speed")
    parser.add_argument("--show", metavar="RESULTS", help="run nothing, only print the tables of earlier results")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser.parse_args()


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The results of all models; they are written after each model."""
    torch.set_num_threads(options.threads)
    file = Path(options.out).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    seconds = QUICK_SECONDS if options.quick else LATENCY_SECONDS
    settings = {"threads": options.threads, "quick": options.quick, "latency_seconds": seconds, "commit": commit()}
    installed = {found.name for found in metadata.distributions()}
    versions = made_by() | {name: metadata.version(name) for name in PEERS if name in installed}
    results: dict[str, Any] = {"host": dataclasses.asdict(host()), "versions": versions, "settings": settings, "rows": []}
    for model in options.model or SUBJECTS:
        for row in Bench(model, file.parent / model, options, console).rows():
            results["rows"].append(row)
            file.write_text(json.dumps(results, indent=1) + "\n")
    return results


class Bench:
    """All methods on one model, one after another: each file is made, judged and timed."""

    def __init__(self, model: str, folder: Path, options: argparse.Namespace, console: Console) -> None:
        self.model, self.folder, self.options, self.console = model, folder, options, console
        self.subject: Subject = SUBJECTS[model]
        self.seconds = QUICK_SECONDS if options.quick else LATENCY_SECONDS
        folder.mkdir(exist_ok=True)

    def rows(self) -> Iterable[Row]:
        start = self.subject.start()
        assert start.model is not None
        judged = {role: self.record(start, batches) for role, batches in self.subject.judged.items()}
        with tempfile.TemporaryDirectory(prefix="benchmark-") as data:
            self.say("storing the calibration data")
            store(self.some(start.calibrate()), Path(data, "calibrate"))
            for method, amount in self.makings(start):
                row = self.make(method, amount, Path(data, "calibrate"))
                if "error" not in row:
                    row["quality"] = {role: attempt(self.quality, row, batches) for role, batches in judged.items()}
                    if self.subject.timed and not self.options.untimed and method != BASELINE:
                        row["latency"] = {name: attempt(self.pair, self.file(row), name) for name in RUNTIME_NAMES}
                self.say(f"  {row.get('error') or row['quality']}")
                yield row

    def makings(self, start: Start) -> list[tuple[str, Amount]]:
        """The dense network once, then every method with every amount that it can be asked for."""
        assert start.model is not None
        wanted = [name for name in METHODS if name != BASELINE and name in (self.options.method or METHODS)]
        pairs = [(name, amount) for amount in self.subject.amounts for name in wanted if METHODS[name].suits(start.model, amount)]
        return [(BASELINE, Amount("ratio", 1.0)), *pairs]

    def some(self, batches: Iterable[Any]) -> Iterable[Any]:
        return islice(batches, QUICK_BATCHES) if self.options.quick else batches

    def say(self, what: str) -> None:
        self.console.print(f"{self.subject.name}: {what}", highlight=False)

    def file(self, row: Row) -> Path:
        amount = "" if row["method"] == BASELINE else f"-{row['kind']}-{row['left']:.3g}"
        return self.folder / f"{row['method']}{amount}.onnx"

    # Making --------------------------------------------------------------------------------------------------------------------------

    def make(self, method: str, amount: Amount, data: Path) -> Row:
        row: Row = {"model": self.model, "method": method, **dataclasses.asdict(amount)}
        file = self.file(row)
        file.unlink(missing_ok=True)
        self.say(f"{METHODS[method].name}, {amount}")
        request = [self.model, method, amount.kind, str(amount.left), str(data), str(file), str(self.options.threads)]
        answer = self.ask(request, file.with_suffix(".log"))
        if "error" in answer:
            return row | {"error": answer["error"]}
        return row | {"making": answer, "bytes": size(file).value, "sha256": Artifact.of(file, "onnxruntime").sha256}

    def ask(self, request: list[str], log: Path) -> Row:
        """The answer of a fresh process, see pruning_making.py; what it prints goes to ``log``."""
        known = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.options.threads)) | {"PYTHONPATH": os.pathsep.join(known)}
        command = [sys.executable, str(Path(__file__).with_name("pruning_making.py")), *request]
        try:
            with log.open("w") as errors:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False, timeout=TIME_LIMIT)
            return json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {TIME_LIMIT} seconds"}
        except (IndexError, ValueError):
            return {"error": f"the process {death(done.returncode)}"}

    # Judging and timing --------------------------------------------------------------------------------------------------------------

    def record(self, start: Start, batches: Batches) -> list[Any]:
        assert start.model is not None
        return list(recorded(start.model, self.some(batches())))

    def quality(self, row: Row, batches: list[Any]) -> Row:
        """The file in ONNX Runtime against the torch model."""
        session = open_artifact(self.file(row), "onnxruntime", 1)
        came = [session(inputs).numpy() for inputs, _, _ in batches]
        return self.subject.quality([expected for _, _, expected in batches], came, [classes for _, classes, _ in batches])

    def pair(self, file: Path, runtime: str) -> Row:
        """Latency beside the dense file in the same runtime, run in turn."""
        found = latency(file, self.subject.sample(), runtime, 1, baseline=self.folder / f"{BASELINE}.onnx", seconds=self.seconds)
        return {name: plain(measurement) for name, measurement in found.items()}


if __name__ == "__main__":
    sys.exit(main())
