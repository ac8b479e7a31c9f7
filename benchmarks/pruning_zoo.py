"""Structured pruning of every architecture of tests/architectures.py, tool by tool, and a judge's word on what each tool made.

    python benchmarks/pruning_zoo.py                                     # everything, about 15 minutes
    python benchmarks/pruning_zoo.py --architecture vit --ratio 0.5
    python benchmarks/pruning_zoo.py --show runs/pruning_zoo/results.json

Each pruning runs in a process of its own, with a limit on its CPU time. Outcomes: ``right`` (runs, is smaller, and computes what the original does
when what is read of the removed positions is zero), ``wrong``, ``crash``, ``forward fails``, ``no answer`` (within the limit),
``nothing pruned``, ``not judged``. How the judge knows stands in pruning_judge.py.

Torch-Pruning is used as its documentation shows for a first use: magnitude importance, a ratio for all layers, ``ignored_layers`` for those
that make the outputs. Hints about attention heads, which it takes for some models, and repairs of the module afterwards are not given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pruning_judge import OUTCOMES, Outcome, judge, output_layers, tensors
from torch import nn

from downsize.network.capture import capture
from downsize.network.cut import Survivors, cut
from downsize.network.fold import fold_constants
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.numerics.importance import magnitude

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
RATIOS = (0.25, 0.5)
BATCH = 2

Tool = Callable[[nn.Module, Any, float], Any]


def torch_pruning(model: nn.Module, example: Any, ratio: float) -> nn.Module:
    """``model`` with ``ratio`` of the channels of each group removed, in place."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]  (a peer, not a dependency)

    # A bare tensor would be taken apart along the batch.
    inputs: Any = (example,) if isinstance(example, torch.Tensor) else example
    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=output_layers(model, example),
        output_transform=tensors,
    )
    pruner.step()
    return model


class Cut:
    """A network of downsize's, called as the model is, with the model's parameters by their names.

    Those that it never reads are as they were; the parts of a weight that was computed once (weight norm) lose the weight's positions.
    """

    def __init__(self, network: Network, model: nn.Module, survivors: Survivors) -> None:
        self.network, self.model, self.survivors = network, model, survivors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        cut = dict(self.network.named_tensors())
        aliases = {id(tensor): name for name, tensor in self.model.named_parameters(remove_duplicate=False) if name in cut}
        for name, tensor in self.model.named_parameters(remove_duplicate=remove_duplicate):
            yield name, cut[aliases[id(tensor)]] if id(tensor) in aliases else self._part(name, tensor)

    def _part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        whole = f"{name.split('.parametrizations.')[0]}.weight"
        lineage = self.survivors.lineage
        for constant, dims in lineage.constants.values() if ".parametrizations." in name else ():
            if constant == whole:
                for dim, vector in enumerate(dims):
                    if tensor.shape[dim] == len(vector):
                        tensor = tensor.index_select(dim, torch.from_numpy(self.survivors.of(vector).nonzero()[0]))
        return tensor


def downsize(model: nn.Module, example: Any, ratio: float) -> Cut:
    """``ratio`` of the units of every axis removed, those with the least L2 norms; every axis keeps one."""
    network = capture(model, example)
    fold_constants(network)
    lineage = Lineage(network)
    dead = {}
    # A mean over heads (attention weights as an output) changes with their number: such an axis is inexact, and left alone as prune() does.
    for axis in [axis for axis in lineage.axes if axis.exact or axis.kind != "heads"]:
        parts = [(network.tensor(name), dim, torch.from_numpy(unit)) for (name, dim), unit in axis.carriers.items()]
        order = magnitude(parts, axis.units).argsort()
        dead[axis.name] = order[: min(round(ratio * axis.units), axis.units - 1)].tolist()
    return Cut(cut(lineage, dead), model, Survivors(lineage, dead))


# A tool gets a model, an example and a ratio, and returns what is called like the model and has its parameters by their names.
TOOLS: dict[str, Tool] = {"downsize": downsize, "torch-pruning": torch_pruning}


def main() -> int:
    options = arguments()
    if options.one:
        # CPU time, so that a busy machine changes no outcome.
        resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit + 10))
        print(json.dumps(dataclasses.asdict(one(options.tool[0], options.architecture[0], options.ratio[0]))))
        return 0
    rows = json.loads(Path(options.show).read_text())["rows"] if options.show else run(options)
    print(markdown(rows))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architecture", action="append", metavar="NAME", help="which architectures (all)")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="which tools (all)")
    parser.add_argument("--ratio", action="append", type=float, help=f"which share of the channels goes (each of {RATIOS})")
    parser.add_argument("--limit", type=int, default=120, metavar="SECONDS", help="CPU time for one pruning and its judging (%(default)s)")
    parser.add_argument("--out", default="runs/pruning_zoo/results.json", help="where the results go (%(default)s)")
    parser.add_argument("--show", metavar="RESULTS", help="run nothing, print the table of earlier results")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All outcomes; they are written after each."""
    from architectures import ARCHITECTURES  # pyright: ignore[reportMissingImports]

    file = Path(options.out).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in ("torch", "torch-pruning", "transformers")}
    rows: list[dict[str, Any]] = []
    for name in options.architecture or ARCHITECTURES:
        for tool in options.tool or TOOLS:
            for ratio in options.ratio or RATIOS:
                outcome = apart(tool, name, ratio, options.limit)
                rows.append({"architecture": name, "tool": tool, "ratio": ratio, **dataclasses.asdict(outcome)})
                print(f"{name} {tool} {ratio}: {outcome.word} {outcome.detail}", file=sys.stderr, flush=True)
                file.write_text(json.dumps({"versions": versions, "limit": options.limit, "rows": rows}, indent=1))
    return rows


def apart(tool: str, name: str, ratio: float, limit: int) -> Outcome:
    """The outcome from a fresh process that is stopped after ``limit`` seconds of CPU time (or ten times as long, should it sleep)."""
    command = [sys.executable, __file__, "--one", "--tool", tool, "--architecture", name, "--ratio", str(ratio), "--limit", str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        out, errors = process.communicate(timeout=10 * limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome("no answer", f"stopped after {10 * limit} s")
    if process.returncode == -signal.SIGXCPU:
        return Outcome("no answer", f"stopped after {limit} s of CPU time")
    if process.returncode < 0:
        return Outcome("crash", f"signal {-process.returncode}")
    if process.returncode:
        raise RuntimeError(f"the judge itself failed on {name}:\n{errors}")
    return Outcome(**json.loads(out.splitlines()[-1]))


def one(tool: str, name: str, ratio: float) -> Outcome:
    """Prune and judge here."""
    from architectures import ARCHITECTURES  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    specimen = ARCHITECTURES[name]
    inputs = specimen.inputs(BATCH)
    return judge(specimen.make(), lambda model: TOOLS[tool](model, inputs, ratio), inputs)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line an architecture, a column a tool and ratio; below, how often each outcome came."""
    columns = list(dict.fromkeys((row["tool"], row["ratio"]) for row in rows))
    cells = {(row["architecture"], row["tool"], row["ratio"]): row for row in rows}
    lines = ["| | " + " | ".join(f"{tool}, {ratio:g}" for tool, ratio in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(row["architecture"] for row in rows):
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get((name, *column))) for column in columns) + " |")
    counts = [Counter(row["word"] for row in rows if (row["tool"], row["ratio"]) == column) for column in columns]
    lines += [f"| **{word}** | " + " | ".join(str(count[word]) for count in counts) + " |" for word in OUTCOMES if any(c[word] for c in counts)]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    share = f", {row['removed']:.0%} gone" if row["removed"] else ""
    gap = f", off by {row['gap']:.1g}" if row["word"] == "wrong" else ""
    return f"{row['word']}{share}{gap}"


if __name__ == "__main__":
    sys.exit(main())
