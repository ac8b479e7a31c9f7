"""int8 side by side: downsize, onnxruntime.quantization and nncf on three models, in one run.

    python benchmarks/int8.py                                  # everything, about 20 minutes
    python benchmarks/int8.py --model lite0 --method downsize --method nncf
    python benchmarks/int8.py --quick                          # a few samples: to see that it works, not for numbers
    python benchmarks/int8.py --show runs/int8/results.json --markdown

Every file is made in its own process from the same torch model and the same calibration data. What is measured, and how, stands in
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from methods import BASELINE, METHODS, OURS
from models import SUBJECTS, Subject, store, weight_bytes
from rich.console import Console
from tables import markdown, tables, to_rich

from downsize.errors import DownsizeError
from downsize.facts import Artifact, Measurement, made_by
from downsize.measure import Recording, host, latency, size
from downsize.measure.process import THREAD_VARIABLES, death
from downsize.runtimes import RUNTIMES, open_artifact

ROOT = Path(__file__).parent.parent
RUNTIME_NAMES = ("onnxruntime", "openvino")
LATENCY_SECONDS, QUICK_SECONDS = 8.0, 0.5
QUICK_BATCHES = 2
WIDTH = 170  # of what is printed into a file

Row = dict[str, Any]


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
    parser.add_argument("--method", action="append", choices=METHODS, help="which methods (all); the float baseline is always made")
    parser.add_argument("--out", default="runs/int8/results.json", help="the results; the model files are put beside them (%(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="CPUs and threads of a making (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few samples and short timings")
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
    versions = made_by() | {name: metadata.version(name) for name in ("nncf", "transformers") if _installed(name)}
    results: dict[str, Any] = {"host": dataclasses.asdict(host()), "versions": versions, "settings": settings, "rows": []}
    for model in options.model or SUBJECTS:
        results["rows"] += Bench(model, file.parent / model, options, console).rows()
        file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def commit() -> str:
    """The commit of this source, and whether the library differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "--", "downsize") else "")


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


class Bench:
    """All methods on one model: first all files are made, then all are judged, then all are timed."""

    def __init__(self, model: str, folder: Path, options: argparse.Namespace, console: Console) -> None:
        self.model, self.folder, self.options, self.console = model, folder, options, console
        self.subject: Subject = SUBJECTS[model]
        self.seconds = QUICK_SECONDS if options.quick else LATENCY_SECONDS
        folder.mkdir(exist_ok=True)

    def rows(self) -> list[Row]:
        wanted = self.options.method or list(METHODS)
        methods = [name for name in METHODS if name in wanted or name == BASELINE]
        start = self.subject.start()
        methods = [name for name in methods if start.transformer or not METHODS[name].transformers_only]
        with tempfile.TemporaryDirectory(prefix="benchmark-") as data:
            store(self.some(start.calibrate()), Path(data, "calibrate"))
            rows = [self.make(method, Path(data, "calibrate")) for method in methods]
        self.judge(rows, start.model)
        for row in rows:
            self.time(row)
        self.time_against_ours(rows)
        return rows

    def some(self, batches: Iterable[Any]) -> Iterable[Any]:
        return islice(batches, QUICK_BATCHES) if self.options.quick else batches

    def file(self, row: Row) -> Path:
        return self.folder / f"{row['method']}.onnx"

    def say(self, what: str) -> None:
        self.console.print(f"{self.subject.name}: {what}", highlight=False)

    # Making --------------------------------------------------------------------------------------------------------------------------

    def make(self, method: str, data: Path) -> Row:
        row: Row = {"model": self.model, "method": method}
        file = self.file(row)
        file.unlink(missing_ok=True)
        self.say(f"making {METHODS[method].name}")
        row["making"] = self.ask([self.model, method, str(data), str(file), str(self.options.threads)], file.with_suffix(".log"))
        if "error" in row["making"]:
            row["error"] = row["making"]["error"]
            self.say(f"  {METHODS[method].name} failed: {row['error']} (log: {file.with_suffix('.log')})")
        else:
            row |= {"bytes": size(file).value, "sha256": Artifact.of(file, "onnxruntime").sha256}
        return row

    def ask(self, request: list[str], log: Path) -> Row:
        """The answer of a fresh process, see making.py; what it prints goes to ``log``."""
        threads = self.options.threads
        known = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"PYTHONPATH": os.pathsep.join(known)}
        # Threads that spin while they wait cost all methods time on a busy machine; and nncf is to send no usage reports.
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "NNCF_CI": "1"}
        command = [sys.executable, str(Path(__file__).with_name("making.py")), *request]
        with log.open("w") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False)
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            return {"error": f"the process {death(done.returncode)}"}

    # Judging -------------------------------------------------------------------------------------------------------------------------

    def judge(self, rows: list[Row], model: Any) -> None:
        """Agreement with the torch model, on the same inputs, in both runtimes."""

        def predict(inputs: Any) -> Any:
            with torch.no_grad():
                return model(**inputs) if isinstance(inputs, dict) else model(inputs)

        for role, batches in self.subject.judged.items():
            self.say(f"judging on the data for {role!r}")
            recording = Recording(predict, self.some(batches()))
            for row in rows:
                if "error" not in row:
                    found = {name: attempt(self.quality, recording, row, name) for name in RUNTIME_NAMES}
                    row.setdefault("quality", {})[role] = found
        for row in rows:
            row["weight_bytes"] = weight_bytes(model)

    def quality(self, recording: Recording, row: Row, runtime: str) -> Row:
        judgement = recording.judge(open_artifact(self.file(row), runtime, self.options.threads), None)
        fidelity = judgement.measurements["score"]
        return dataclasses.asdict(judgement.agreement) | {"cosine_low": fidelity.low, "cosine_high": fidelity.high}

    # Timing --------------------------------------------------------------------------------------------------------------------------

    def time(self, row: Row) -> None:
        """Latency beside the float file of torch.onnx.export in the same runtime."""
        baseline = self.folder / f"{BASELINE}.onnx"
        if "error" in row or not baseline.exists():
            return
        self.say(f"timing {METHODS[row['method']].name}")
        row["latency"] = {name: attempt(self.pair, self.file(row), baseline, name) for name in RUNTIME_NAMES}

    def time_against_ours(self, rows: list[Row]) -> None:
        """Latency of downsize's file beside each peer's, in the same runtime."""
        ours = next((row for row in rows if row["method"] == OURS and "error" not in row), None)
        peers = [row for row in rows if row["method"] not in (BASELINE, "downsize-float", OURS) and "error" not in row]
        if ours is None:
            return
        for row in peers:
            self.say(f"timing downsize beside {METHODS[row['method']].name}")
            row["ours_against_it"] = {name: attempt(self.pair, self.file(ours), self.file(row), name) for name in RUNTIME_NAMES}

    def pair(self, file: Path, baseline: Path, runtime: str) -> Row:
        found = latency(file, self.subject.sample(), runtime, 1, baseline=baseline, seconds=self.seconds)
        return {name: plain(measurement) for name, measurement in found.items()}


def plain(measurement: Measurement) -> Row:
    """A measurement as JSON, without the host, which is the same for all."""
    fields = dataclasses.asdict(measurement)
    return {name: fields[name] for name in ("value", "low", "high", "samples", "runtime", "note")}


def attempt(measure: Callable[..., Row], *given: Any) -> Row:
    """What was measured, or the error: a file that a runtime refuses is a result too."""
    try:
        return measure(*given)
    except DownsizeError as error:
        return {"error": f"{type(error).__name__}: {error}"[:600]}


if __name__ == "__main__":
    assert RUNTIMES.keys() >= set(RUNTIME_NAMES)
    sys.exit(main())
