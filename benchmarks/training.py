"""What training gives back: fine-tuning, distillation, few bits, few weights; beside the same budget without a teacher.

    python benchmarks/training.py                               # everything: hours
    python benchmarks/training.py --case lenet5 --seed 0        # one case, one seed
    python benchmarks/training.py --show --markdown             # the tables of what was run so far

Results are added to runs/training/results.json line by line; a line that is there already is not made again. All figures are of the written
ONNX file in ONNX Runtime. What is measured, and how, stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import training_fashion
import training_real
from int8 import WIDTH, commit
from rich.console import Console
from tables import Cells, markdown, to_rich

CASES = {**training_fashion.CASES, **training_real.CASES}
SEEDS = {**dict.fromkeys(training_fashion.CASES, (0, 1, 2)), **dict.fromkeys(training_real.CASES, (0,))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", action="append", choices=CASES, help="which cases (all)")
    parser.add_argument("--seed", action="append", type=int, help="which seeds (0, 1, 2; of the real models 0)")
    parser.add_argument("--out", default="runs/training/results.json", help="the results (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing, only print the tables")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = Path(options.out)
    if not options.show:
        for case in options.case or CASES:
            for seed in options.seed or SEEDS[case]:
                run(case, seed, file)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in tables(known(file)):
        print(markdown(table), end="\n\n") if options.markdown else console.print(to_rich(table))
    return 0


def known(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def run(case: str, seed: int, file: Path) -> None:
    """All lines of a case that are not known yet; each is written down as soon as it is measured."""
    for row in CASES[case](seed):
        if any((line["case"], line["seed"], line["name"]) == (case, seed, row.name) for line in known(file)):
            continue
        began = time.process_time()
        network = row.make()
        seconds = time.process_time() - began
        line = {"case": case, "seed": seed, "name": row.name, "cpu_seconds": seconds, "commit": commit(), "quality": row.judge(network)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([*known(file), line], indent=1))
        print(case, seed, row.name, {name: round(value, 4) for name, value in line["quality"].items()}, f"{seconds:.0f} s", flush=True)


def tables(lines: list[dict[str, Any]]) -> list[Cells]:
    """A table for each case: means over the seeds, and in brackets the values of each."""
    found = []
    for case in CASES:
        own = [line for line in lines if line["case"] == case]
        if own:
            names, figures = list(dict.fromkeys(line["name"] for line in own)), list(own[0]["quality"])
            rows = [[name, *cells([line for line in own if line["name"] == name], figures)] for name in names]
            found.append(Cells((CASES[case].__doc__ or case).strip(), ["network", *figures, "CPU seconds"], rows, []))
    return found


def cells(lines: list[dict[str, Any]], figures: list[str]) -> list[str]:
    texts = []
    for number, figure in enumerate(figures):
        values = [line["quality"][figure] for line in lines]
        each = f" ({', '.join(f'{value:.4g}' for value in values)})" if number == 0 and len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.4g}{each}")
    return [*texts, f"{statistics.mean(line['cpu_seconds'] for line in lines):.0f}"]


if __name__ == "__main__":
    sys.exit(main())
