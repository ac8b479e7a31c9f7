"""The command line: fit, run, inspect, measure, runtimes.

Exit status: 0 the limits are met (or the command did its work), 1 a limit is missed, 2 the input cannot be used (one message says what
and the mend), 3 a fault in downsize or in the user's code (with its traceback), 130 interrupted.
"""

from __future__ import annotations

import _thread
import filecmp
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from .errors import DownsizeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .planner import Result
    from .progress import Progress
    from .target import Target
    from .task import Task

MET, MISSED, UNUSABLE, FAULT, INTERRUPTED = 0, 1, 2, 3, 130
AGAIN = 0.05  # seconds


class _Commands(TyperGroup):
    """Errors raised on purpose become one message; typer itself sees to wrong options and to Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DownsizeError as error:
            _complain(str(error))
            raise typer.Exit(UNUSABLE) from None


app = typer.Typer(
    name="downsize",
    cls=_Commands,
    help="From a trained PyTorch model to a smaller, faster file that runs, with a measured verdict on your limits.\n\n"
    "A task is a Python file that defines `task`, a downsize.Task: the model, an example of its inputs, data, and a score.",
    epilog="Start with:  downsize inspect TASK.py   then:  downsize fit TASK.py --size 5MB --drop 1%",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

TaskFile = Annotated[str, typer.Argument(metavar="TASK.py", help="A Python file that defines `task`.", show_default=False)]
RuntimeName = Annotated[str, typer.Option("--runtime", help="The program that will run the file; `downsize runtimes` lists them.")]
Threads = Annotated[str, typer.Option("--threads", help="Threads it will run on.")]
Batch = Annotated[str, typer.Option("--batch", help="Samples in one call.")]
Size = Annotated[str | None, typer.Option("--size", help="At most so many bytes: 5.2MB, 900kB, 1MiB.", show_default=False)]
Latency = Annotated[str | None, typer.Option("--latency", help="At most so long for one call (median): 5ms.", show_default=False)]
Ratio = Annotated[
    str | None, typer.Option("--latency-ratio", help="At most this part of the original's latency there: 0.65 or 65%.", show_default=False)
]
Memory = Annotated[str | None, typer.Option("--memory", help="At most so much peak memory for opening and running it: 64MB.", show_default=False)]
Drop = Annotated[str | None, typer.Option("--drop", help="At most so much less score, absolute: 1% (0.75 to 0.74).", show_default=False)]
Length = Annotated[int, typer.Option("--length", min=1, help="Size of open dimensions (text length, image side) where no task gives it.")]
Into = Annotated[
    Path | None, typer.Option("--into", help="The run folder; the same call goes on in it. Default: runs/ and the task's name.", show_default=False)
]


@app.command(
    epilog="Example:  downsize fit examples/photos.py --size 5.2MB --latency-ratio 0.8 --drop 5% --into runs/photos\n\n"
    "The file is runs/photos/model.onnx, the numbers are in report.json beside it."
)
def fit(
    task: TaskFile,
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = "1",
    size: Size = None,
    latency: Latency = None,
    latency_ratio: Ratio = None,
    memory: Memory = None,
    drop: Drop = None,
    batch: Batch = "1",
    into: Into = None,
) -> None:
    """Make the best file within your limits: the planner tries what fits the runtime and keeps what pays.

    Exit status 0: all limits are met; 1: not, and the verdict says which limit binds and what would be met.
    """
    target = _target(locals())
    from .planner import fit as work

    _work(task, into, lambda loaded, folder, progress: work(loaded, target, folder, progress))


@app.command(
    epilog="Example:  downsize run examples/photos.py \"quantize(activations='dynamic')\" --size 5.2MB --into runs/dynamic\n\n"
    "Steps are separated by |; the same recipe may stand in Python or YAML."
)
def run(
    task: TaskFile,
    recipe: Annotated[str, typer.Argument(metavar='"RECIPE"', help='Techniques in order, e.g. "prune(macs=0.5) | quantize()".', show_default=False)],
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = "1",
    size: Size = None,
    latency: Latency = None,
    latency_ratio: Ratio = None,
    memory: Memory = None,
    drop: Drop = None,
    batch: Batch = "1",
    into: Into = None,
) -> None:
    """Build the file of your own recipe and judge it by the limits you give.

    Techniques: prune, factorize, finetune, distill, sparsify, quantize, compensate, halve. They are joined by |, and a plan of training may
    stand in another step: "prune(macs=0.5, tune=finetune(epochs=1)) | quantize(bits=4, train=distill(epochs=2))". Their fields are in docs/.
    Exit status as for fit.
    """
    target = _target(locals())
    from .planner import run as work
    from .recipe import Recipe

    parsed = Recipe.parse(recipe)
    _work(task, into, lambda loaded, folder, progress: work(loaded, parsed, target, folder, progress))


@app.command(epilog="Examples:  downsize inspect examples/photos.py   ·   downsize inspect runs/photos/model.onnx --threads 2")
def inspect(
    what: Annotated[str, typer.Argument(metavar="TASK.py|MODEL.onnx|NETWORK", help="A task, a model file, or a saved network.", show_default=False)],
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = "1",
    batch: Batch = "1",
    depth: Annotated[int, typer.Option("--depth", min=1, help="Levels of module names to show; deeper ones are summed up.")] = 99,
    time: Annotated[bool, typer.Option(help="Also export it and measure where the time goes.")] = True,
    length: Length = 128,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Instead show what fewer bits of each weight and input would cost.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="With --sensitivity: estimate it from derivatives.")] = False,
) -> None:
    """Show where the parameters, MACs, bytes and milliseconds are, layer by layer under your module names.

    Operators whose MACs were not counted, and time that belongs to no layer, have rows of their own. With --sensitivity, which needs a task:
    what the layer and the network's outputs lose at 8 to 2 bits, and for large losses the reason and what would mend it.
    """
    if sensitivity:
        _sensitivity(what, fast)
        return
    target = _target(locals())
    from .inspection import look
    from .tables import inspection_table

    _out().print(inspection_table(look(what, target, depth, time, length)))


def _sensitivity(what: str, fast: bool) -> None:
    from .progress import Progress
    from .sensitivity import sensitivity
    from .tables import sensitivity_table

    _out().print(sensitivity_table(sensitivity(what, "fisher" if fast else "loss", Progress())))


@app.command(epilog="Example:  downsize measure runs/photos/model.onnx --task examples/photos.py --baseline runs/photos/baseline.onnx")
def measure(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.", show_default=False)],
    task: Annotated[str | None, typer.Option("--task", metavar="TASK.py", help="Brings inputs, data and score.", show_default=False)] = None,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="A file to compare the latency with, in turn.", show_default=False)] = None,
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = "1",
    batch: Batch = "1",
    seconds: Annotated[float, typer.Option("--seconds", help="How long to time it.")] = 3.0,
    length: Length = 128,
) -> None:
    """Measure a file: bytes, latency, peak memory; with a task also its score beside the original model's.

    Without a task the inputs are random numbers in the shapes that the file asks for.
    """
    target = _target(locals())
    from .inspection import measure_file
    from .tables import measurement_table

    _out().print(measurement_table(*measure_file(model, target, task, baseline, seconds, length)))


@app.command(epilog="Example:  downsize runtimes")
def runtimes() -> None:
    """List the runtimes: their versions here, or why they cannot be used and the line that brings them."""
    from .runtimes import RUNTIMES
    from .tables import runtime_table

    _out().print(runtime_table(RUNTIMES.values()))


def main() -> None:
    """The program `downsize`; see the module for its exit status."""
    # Threads that wait by spinning take the cores from one another, and from the measurements, on a busy machine. Before torch comes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.unraisablehook = _not_lost
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(FAULT)


def _not_lost(lost: sys.UnraisableHookArgs) -> None:
    """Ctrl-C while Python clears an object away, where it drops every exception, comes again a moment later."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        threading.Timer(AGAIN, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def _target(options: dict[str, Any]) -> Target:
    """The target of a command's options: those that bear the names of its fields and were given. Its runtime must be here."""
    from .runtimes import require
    from .target import Target

    names = ("runtime", "threads", "size", "latency", "latency_ratio", "memory", "drop", "batch")
    target = Target(**{name: options[name] for name in names if options.get(name) is not None})
    require(target.runtime)
    return target


def _work(task: str, into: Path | None, work: Callable[[Task, Path, Progress], Result]) -> None:
    """Do the work of fit or run: say what came of it, and leave with the status of the verdict."""
    from .progress import Progress
    from .tables import result_text
    from .task import load_task

    folder = into or Path("runs") / Path(task).stem
    try:
        result = work(load_task(task), folder, Progress())
    except KeyboardInterrupt:
        _complain(f"Interrupted: {_left_in(folder)}. The same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None
    _out().print(result_text(result.report))
    _out().print(Text(f"file: {result.artifact.path}"))
    raise typer.Exit(MET if result.verdict.met else MISSED)


def _left_in(folder: Path) -> str:
    """What an interrupted run leaves: the best file so far, which may be the original, or none."""
    found = sorted(path for path in folder.glob("model.*") if path.is_file())
    if not found:
        return "there is no file yet"
    baseline = found[0].with_stem("baseline")
    if baseline.is_file() and filecmp.cmp(found[0], baseline, shallow=False):
        return f"no file is better than the original yet, which is {found[0]}"
    return f"the best file so far is {found[0]}, its numbers are in {folder / 'report.json'}"


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(message, style="red"))


def _out() -> Console:
    """The console for results; tables are not squeezed into 80 columns where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


if __name__ == "__main__":
    main()
