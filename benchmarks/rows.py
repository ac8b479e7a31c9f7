"""Benchmarks made line by line: how a network is made, what its written file is found to be, and the tables of what is known so far."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from int8 import WIDTH, commit
from rich.console import Console
from tables import Cells, markdown, to_rich

from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.runtimes import open_artifact

Quality = dict[str, float]


@dataclass(frozen=True)
class Row:
    """``make`` gives a network, or a file, timed; ``judge`` looks at it, a network as a written file."""

    name: str
    make: Callable[[], Any]
    judge: Callable[[Any], Quality]


Case = Callable[[int], Iterator[Row]]


def measured(network: Network, sample: Any, judge: Callable[[Callable[[Any], Any]], Quality], runtime: str = "onnxruntime") -> Quality:
    """What ``judge`` says of the written file in the runtime, with its bytes and MACs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        write(network, file)
        found = judge(open_artifact(file, runtime, 1))
        cost = count(network, sample)
        return {**found, "MMACs": cost.macs / 1e6, "kB": file.stat().st_size / 1e3}


def main(what: str, cases: Mapping[str, Case], seeds: Mapping[str, Sequence[int]], out: str) -> int:
    """The command line: make the lines that are not known yet, and print the tables."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--case", action="append", choices=cases, help="which cases (all)")
    parser.add_argument("--seed", action="append", type=int, help="which seeds (0, 1, 2; of the real models 0)")
    parser.add_argument("--out", default=out, help="the results (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing, only print the tables")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = Path(options.out)
    if not options.show:
        for case in options.case or cases:
            for seed in options.seed or seeds[case]:
                run(cases, case, seed, file)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in tables(cases, known(file)):
        print(markdown(table), end="\n\n") if options.markdown else console.print(to_rich(table))
    return 0


def known(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def run(cases: Mapping[str, Case], case: str, seed: int, file: Path) -> None:
    """All lines of a case that are not known yet; each is written down as soon as it is measured."""
    for row in cases[case](seed):
        if any((line["case"], line["seed"], line["name"]) == (case, seed, row.name) for line in known(file)):
            continue
        began = time.process_time()
        network = row.make()
        seconds = time.process_time() - began
        line = {"case": case, "seed": seed, "name": row.name, "cpu_seconds": seconds, "commit": commit(), "quality": row.judge(network)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([*known(file), line], indent=1))
        print(case, seed, row.name, {name: round(value, 4) for name, value in line["quality"].items()}, f"{seconds:.0f} s", flush=True)


def tables(cases: Mapping[str, Case], lines: list[dict[str, Any]]) -> list[Cells]:
    """A table for each case: means over the seeds, and in brackets the values of each."""
    found = []
    for case in cases:
        own = [line for line in lines if line["case"] == case]
        if own:
            names, figures = list(dict.fromkeys(line["name"] for line in own)), list(own[0]["quality"])
            rows = [[name, *cells([line for line in own if line["name"] == name], figures)] for name in names]
            found.append(Cells((cases[case].__doc__ or case).strip(), ["network", *figures, "CPU seconds"], rows, []))
    return found


def cells(lines: list[dict[str, Any]], figures: list[str]) -> list[str]:
    texts = []
    for number, figure in enumerate(figures):
        values = [line["quality"][figure] for line in lines if figure in line["quality"]]
        each = f" ({', '.join(f'{value:.4g}' for value in values)})" if number == 0 and len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.4g}{each}")
    return [*texts, f"{statistics.mean(line['cpu_seconds'] for line in lines):.0f}"]
