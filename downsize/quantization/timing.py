"""Networks as files in the runtime of a clock: where the time of each goes, weight by weight, and how long they take beside one another."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

from ..errors import TaskError
from ..network.network import Network

PROFILES, RUNS = 3, 10  # how often a file is opened and profiled, of which the least time counts, and the calls in each
BLOCKS, SECONDS = 60, 0.02  # how often two files take turns, and how long each time
# What multiplies with a weight or reads rows of one, in the names that runtimes and ONNX give it.
PRODUCTS = ("conv", "gemm", "matmul", "fullyconnected", "lstm", "gru", "rnn", "gather")
NO_PRODUCT = ("convert",)
STEPS = 8  # from a weight to its product, or back from what was fused into one


class Spent(NamedTuple):
    """Seconds of one call: of a weight's own kernel; and of what ran before it since the last one's, such as quantizing its input."""

    own: float = 0.0
    before: float = 0.0

    @property
    def all(self) -> float:
        """Both."""
        return self.own + self.before


class Timed(NamedTuple):
    """Seconds of one call, and their ratio to those of the float file, with which it took turns."""

    seconds: float
    ratio: float


class Ran(Protocol):
    """What a runtime tells of a node that it ran; in the order in which they ran."""

    @property
    def node(self) -> str:
        """Its name, or one that holds it."""
        ...

    @property
    def operator(self) -> str:
        """What it computes."""
        ...

    @property
    def seconds(self) -> float:
        """Of one call."""
        ...


class FileClock(Protocol):
    """A clock that knows the runtime too: ``runtime`` writes (``export``), opens and profiles files, on ``threads`` threads.

    :class:`~downsize.measure.shapes.LatencyTable` is one.
    """

    runtime: Any
    threads: int


def file_clock(clock: Any) -> FileClock:
    """The clock.

    Raises:
        TaskError: it knows layers alone.
    """
    if not all(hasattr(getattr(clock, "runtime", None), name) for name in ("export", "open", "profile")) or not hasattr(clock, "threads"):
        raise TaskError(f"the task's clock is a {type(clock).__name__}, which cannot time files; expected a downsize.measure.shapes.LatencyTable.")
    return clock


class Files:
    """Networks written into ``folder`` and timed beside ``baseline`` on ``inputs``.

    Args: ``modules``: the names of weights, each with the module that multiplies with it ("" where it is not alone there).
    """

    def __init__(self, clock: FileClock, baseline: Network, inputs: Any, modules: Mapping[str, str], folder: Path) -> None:
        self.clock, self.inputs, self.modules, self.folder = clock, inputs, modules, folder
        self.number = 0
        self.baseline = self.write(baseline)

    def write(self, network: Network) -> Path:
        """A new file."""
        path = self.folder / f"{self.number}{self.clock.runtime.suffix}"
        self.number += 1
        self.clock.runtime.export(network, path)
        return path

    def spent(self, path: Path) -> dict[str, Spent]:
        """By weight, of a file; under "" what belongs to none."""
        owner = Owners(path, self.modules)
        found = [spent(self.clock.runtime.profile(path, self.clock.threads, self.inputs, RUNS), owner) for _ in range(PROFILES)]
        least = {}
        for name in found[0]:
            each = [one.get(name, Spent()) for one in found]
            least[name] = Spent(min(one.own for one in each), min(one.before for one in each))
        return least

    def timed(self, path: Path) -> Timed:
        """A file in turn with the baseline."""
        sessions = [self.clock.runtime.open(one, self.clock.threads) for one in (path, self.baseline)]
        arrays = [session.arrays(self.inputs) for session in sessions]
        return in_turn(*(lambda s=session, a=array: s.run(a) for session, array in zip(sessions, arrays, strict=True)))


def in_turn(call: Callable[[], object], other: Callable[[], object]) -> Timed:
    """Two calls in short blocks, one and the other first by turns, so that a disturbance of the machine meets both: medians over the blocks."""
    calls = call, other
    for each in (*calls, *calls):
        each()
    repeats = [max(1, min(50, round(SECONDS / max(_seconds(each, 3), 1e-9)))) for each in calls]
    blocks = []
    for number in range(BLOCKS):
        order = (0, 1) if number % 2 else (1, 0)
        found = {which: _seconds(calls[which], repeats[which]) for which in order}
        blocks.append((found[0], found[1]))
    return Timed(median(one for one, _ in blocks), median(one / two for one, two in blocks))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of so many calls, after one that finds the other file's data in the caches."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


def spent(ran: Iterable[Ran], owner: Callable[[Ran], str | None]) -> dict[str, Spent]:
    """The seconds of each weight. What is no product counts for the next product with a weight, or for "" where none follows.

    Args: ``owner``: of a product its weight, "" where it has none; None of what is no product.
    """
    found: dict[str, Spent] = {"": Spent()}
    before = 0.0
    for item in ran:
        name = owner(item)
        if name is None:
            before += item.seconds
            continue
        known = found.get(name, Spent())
        found[name] = Spent(known.own + item.seconds, known.before + (before if name else 0.0))
        before = 0.0 if name else before
    found[""] = Spent(found[""].own, before)
    return found


# Whose a node is --------------------------------------------------------------------------------------------------------------------


class Owners:
    """For what ran of the ONNX file at ``path``: the weight that it multiplies with, by the name of the network's tensor."""

    def __init__(self, path: Path, modules: Mapping[str, str]) -> None:
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
        self.makers = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes = {**self.makers, **{node.name: node for node in graph.node if node.name}}
        self.owners = self._owners([item.name for item in graph.initializer], modules)
        self.by_module = {module: name for name, module in modules.items() if module}

    def __call__(self, ran: Ran) -> str | None:
        """Its weight; "" for a product without one, None for what is no product."""
        if not _is_product(ran.operator):
            return None
        node = self._node(ran.node)
        for _ in range(STEPS):  # a fused product bears the name of what was fused into it
            if node is None or _is_product(node.op_type):
                break
            node = next((self.makers[name] for name in node.input if name in self.makers), None)
        if node is None:
            return ""
        return self.owners.get(node.name) or self.by_module.get(node.name.rpartition(":")[0], "")

    def _node(self, name: str) -> Any:
        """The node that a runtime's name holds the name of, or of an output of which it does."""
        if name in self.nodes:
            return self.nodes[name]
        inside = [known for known in self.nodes if _holds(name, known)]
        return self.nodes[max(inside, key=len)] if inside else None

    def _owners(self, stored: Sequence[str], modules: Collection[str]) -> dict[str, str]:
        """The weight of each product, by the node's name: stored under its own name, or with an ending, as in ``fc.weight_codes``."""
        found: dict[str, str] = {}
        for name in stored:
            weight = name if name in modules else name.rpartition("_")[0]
            values = [name] if weight in modules else []
            for _ in range(STEPS):
                nodes = [node for value in values for node in self.readers.get(value, ())]
                found |= {node.name: weight for node in nodes if _is_product(node.op_type)}
                values = [output for node in nodes if not _is_product(node.op_type) for output in node.output]
        return found


def _is_product(operator: str) -> bool:
    name = operator.lower()
    return any(kind in name for kind in PRODUCTS) and not any(kind in name for kind in NO_PRODUCT)


def _holds(text: str, name: str) -> bool:
    """Whether a name stands in a text whole, not as the beginning or the end of another."""
    at = text.find(name)
    return len(name) > 1 and at >= 0 and not (at and text[at - 1].isalnum()) and not text[at + len(name) :][:1].isalnum()
