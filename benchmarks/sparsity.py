"""What zeros are worth: accuracy of sparse classifiers, and bytes and speed of sparse files in both runtimes.

    python benchmarks/sparsity.py                                    # everything, about 20 minutes of a CPU
    python benchmarks/sparsity.py --only accuracy                    # or files
    python benchmarks/sparsity.py --quick --level 90%                # short timings: only to see that it works
    python benchmarks/sparsity.py --show runs/sparsity/results.json --markdown

accuracy: LeNet-300-100 and a small ResNet on Fashion-MNIST (see fashion.py), 1,024 unlabelled images, no training; the share of the 10,000 test
images that the written file puts into the right class in ONNX Runtime.

files: a wide perceptron and ResNet-18 with random weights, zeros by magnitude, the same share in every layer: where the zeros are matters to no
kernel, what the other values are neither. Speed: time of the dense file over time of the sparse one, both in one fresh process in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fashion
import torch
from models import ResNet, seeded
from rich.console import Console
from tables import Cells, markdown, to_rich
from torch import nn

from downsize.errors import DownsizeError
from downsize.facts import made_by
from downsize.measure import host, latency, size
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.runtimes import open_artifact
from downsize.task import Task
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify

Row = dict[str, Any]
RUNTIME_NAMES = ("onnxruntime", "openvino")
LEVELS: dict[str, dict[str, Any]] = {
    **{f"{share:.0%}": {"sparsity": share} for share in (0.5, 0.8, 0.9, 0.95)},
    "2:4": {"pattern": "2:4"},
}
PLAIN = {"method": "magnitude", "polish": False}
# The same share in every layer, then as the defaults spread it.
UNIFORM: dict[str, Any] = {"allocation": "uniform"}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": PLAIN | UNIFORM,
    "magnitude, polished": {"method": "magnitude"} | UNIFORM,
    "wanda": {"method": "wanda", "polish": False} | UNIFORM,
    "sparsegpt": {"method": "sparsegpt", "polish": False} | UNIFORM,
    "sparsegpt, polished": {"method": "sparsegpt"} | UNIFORM,
    "surgeon": {"method": "surgeon"} | UNIFORM,
    "magnitude, global": PLAIN | {"allocation": "global"},
    "magnitude, LAMP": PLAIN,
    "auto, ERK": {"allocation": "erk"},
    "auto, global": {"allocation": "global"},
    "auto, LAMP (the default)": {},
}
CLASSIFIERS = {"LeNet-300-100": fashion.lenet, "small ResNet": fashion.small_resnet}


def perceptron() -> nn.Module:
    """1024-2048-2048-1000, 8.3 million weights: they do not fit into a core's own cache."""
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1000)).eval()


FILES = {
    "perceptron, one sample": (perceptron, (1, 1024)),
    "perceptron, 64 samples": (perceptron, (64, 1024)),
    "ResNet-18, one image": (lambda: ResNet().eval(), (1, 3, 224, 224)),
}


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 170)
    results = json.loads(Path(options.show).read_text()) if options.show else run(options, console)
    for table in (accuracy_table(results["accuracy"]), *files_tables(results["files"])):
        if table.rows:
            print(markdown(table), end="\n\n") if options.markdown else console.print(to_rich(table))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("accuracy", "files"), help="one of the two parts")
    parser.add_argument("--out", default="runs/sparsity/results.json", help="the results; the files are put beside them (%(default)s)")
    parser.add_argument("--level", action="append", choices=LEVELS, help="which levels (all); of accuracy not 50%%, where all are near the dense one")
    parser.add_argument("--quick", action="store_true", help="short timings")
    parser.add_argument("--show", metavar="RESULTS", help="run nothing, only print the tables of earlier results")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser.parse_args()


def run(options: argparse.Namespace, console: Console) -> Row:
    """The results of both parts; they are written after each row. A part that is not run keeps its earlier results."""
    torch.set_num_threads(1)
    file = Path(options.out).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    results: Row = json.loads(file.read_text()) if file.exists() else {"accuracy": [], "files": []}
    levels = options.level or list(LEVELS)
    for part, rows in (("accuracy", accuracies(file.parent, levels)), ("files", files(file.parent, levels, options.quick))):
        if options.only in (None, part):
            results[part] = []
            results[f"{part} made on"] = {"host": dataclasses.asdict(host()), "versions": made_by(), "quick": options.quick}
            for row in rows:
                results[part].append(row)
                shown = {key: speed(value) if key in RUNTIME_NAMES else value for key, value in row.items()}
                console.print(", ".join(f"{key} {value}" for key, value in shown.items()), highlight=False)
                file.write_text(json.dumps(results, indent=1) + "\n")
    return results


# Accuracy ---------------------------------------------------------------------------------------------------------------------------


def accuracies(folder: Path, levels: list[str]) -> Iterator[Row]:
    for model, build in CLASSIFIERS.items():
        module = build()
        example = next(fashion.calibrate())[0]
        task = Task(module, example, {"calibrate": fashion.calibrate})
        network = capture(module, example)
        yield {"model": model, "method": "dense", "level": "", "accuracy": accuracy(network, folder)}
        for level, (method, fields) in itertools.product([level for level in levels if level != "50%"], METHODS.items()):
            amount = LEVELS[level]
            if "pattern" not in amount or fields.get("allocation") == "uniform":  # a pattern is the same in every layer
                fields = fields if "pattern" not in amount else {key: value for key, value in fields.items() if key != "allocation"}
                made = Sparsify(**amount, **fields, keep_ends=False, samples=fashion.CALIBRATION)(network, task)
                row = {"model": model, "method": method, "level": level, "zeros": zeros(made), "accuracy": accuracy(made, folder)}
                if method == "auto, LAMP (the default)":
                    row["int8 accuracy"] = accuracy(Quantize()(made, task), folder)
                yield row


def accuracy(network: Network, folder: Path) -> float:
    """The share of test images that the file puts into the right class."""
    path = folder / "classifier.onnx"
    write(network, path)
    session = open_artifact(path, "onnxruntime")
    right = sum(int((torch.as_tensor(session(inputs)).argmax(1) == classes).sum()) for inputs, classes in fashion.test() if classes is not None)
    return right / len(fashion.images("t10k")[1])


def zeros(network: Network) -> float:
    """The share of zeros in the weights of layers."""
    tensors = [tensor for tensor in network.parameters() if tensor.dim() > 1]
    return 1 - sum(int(torch.count_nonzero(tensor)) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def accuracy_table(rows: list[Row]) -> Cells:
    models, levels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "level"))
    levels = [level for level in levels if level]
    lines = []
    dense = {row["model"]: row["accuracy"] for row in rows if row["method"] == "dense"}
    for method in METHODS:
        found = {(row["model"], row["level"]): row for row in rows if row["method"] == method}
        cells = [found.get((model, level)) for model in models for level in levels]
        lines.append([method, *("" if cell is None else f"{100 * cell['accuracy']:.1f}" for cell in cells)])
    last = {(row["model"], row["level"]): row["int8 accuracy"] for row in rows if "int8 accuracy" in row}
    cells = [last.get((model, level)) for model in models for level in levels]
    lines.append(["the default, then int8", *("" if cell is None else f"{100 * cell:.1f}" for cell in cells)])
    header = ["method", *(f"{model}, {level}" for model in models for level in levels)]
    notes = [f"{model}, dense: {100 * value:.1f} %" for model, value in dense.items()]
    return Cells("right classes of Fashion-MNIST's test images, %", header, lines if rows else [], notes)


# Files ------------------------------------------------------------------------------------------------------------------------------


def files(folder: Path, levels: list[str], quick: bool) -> Iterator[Row]:
    for name, (build, shape) in FILES.items():
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        network = capture(seeded(build), inputs)
        task = Task(seeded(build), inputs, {"calibrate": lambda inputs=inputs: [(inputs, None)]})
        dense = folder / "dense.onnx"
        write(network, dense)
        yield {"model": name, "level": "dense", **weigh(dense)}
        # The dense file beside itself shows how far from 1 a ratio can be for nothing.
        yield {"model": name, "level": "dense again", **weigh(dense), **speeds(dense, dense, inputs, quick)}
        for level in levels:
            amount = LEVELS[level]
            spread = {} if "pattern" in amount else UNIFORM
            made = Sparsify(**amount, **spread, samples=0, keep_ends=False)(network, task)
            path = folder / f"{level.replace(':', '-')}.onnx"
            write(made, path)
            yield {"model": name, "level": level, "zeros": zeros(made), **weigh(path), **speeds(path, dense, inputs, quick)}


def weigh(path: Path) -> Row:
    """The file's bytes, and those of it compressed by deflate, as a zip archive does by default."""
    return {"bytes": size(path).value, "compressed": len(zlib.compress(path.read_bytes()))}


def speeds(path: Path, dense: Path, inputs: torch.Tensor, quick: bool) -> Row:
    found: Row = {}
    for runtime in RUNTIME_NAMES:
        try:
            measured = latency(path, inputs, runtime, baseline=dense, seconds=0.5 if quick else 8.0)
            found[runtime] = {key: dataclasses.asdict(value) for key, value in measured.items()}
        except DownsizeError as error:
            found[runtime] = {"error": str(error)}
    return found


def files_tables(rows: list[Row]) -> Iterable[Cells]:
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for row in rows:
            if row["model"] == model:
                share = f"{row['zeros']:.1%}" if "zeros" in row else ""
                cells = [row["level"], share, f"{row['bytes'] / 1e6:.2f}", f"{row['compressed'] / 1e6:.2f}"]
                lines.append([*cells, *(speed(row.get(runtime, {})) for runtime in RUNTIME_NAMES)])
        yield Cells(model, ["weights", "zeros", "MB", "MB compressed", "speed ONNX Runtime", "speed OpenVINO"], lines, [])


def speed(found: Row) -> str:
    """How many times as fast as the dense file, by CPU time, with the 95 % interval: on a busy machine wall time says less."""
    if "cpu_latency_ratio" not in found:
        return "error" if "error" in found else ""
    ratio = found["cpu_latency_ratio"]
    bounds = "" if ratio["low"] is None else f" ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"
    return f"{1 / ratio['value']:.2f}x{bounds}"


if __name__ == "__main__":
    sys.exit(main())
