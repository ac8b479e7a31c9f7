"""The laws that networks, techniques and files obey, as functions that raise AssertionError with the numbers.

:func:`check_technique` is the contract for a technique of your own:

    def test_my_technique(tmp_path):
        check_technique(MyTechnique(strength=0.5), capture(model, example), task, tmp_path)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, fx

from .facts import Agreement
from .network.empty import shrunk
from .network.lineage import Lineage
from .network.lower_halves import without_rounding
from .network.masked import masked
from .network.network import Network, batch_of
from .network.rewrite import constant
from .network.statistics import Hook, walk
from .numerics.agreement import Comparison
from .numerics.groups import block_steps
from .quantization.blocks import BLOCKS
from .quantization.insertion import DYNAMIC, FAKE
from .quantization.recurrent import DYNAMIC as STATES
from .runtimes import RUNTIMES, open_artifact
from .structure import as_call, flatten, unflatten
from .task import Task, plain

aten = torch.ops.aten
BATCHES = (1, 3)
CODE_FRACTION = 0.005  # of the entries of all requantizations may differ, by one code
STATE_FRACTION = 0.02  # where recurrent layers round their states: one that falls the other way is carried through all later steps
# Relative to an output's largest value:
FLOAT_TOLERANCE = 1e-4  # float kernels of two programs, given the same codes
ROUNDED_THERE = 0.02  # a runtime that rounds float inputs of integer weights to 8 bits in blocks
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


class Simulation(NamedTuple):
    """How a file's integers compare with the network's simulation of them.

    ``requantizations``: how many tensors were compared. ``off``: the fraction of their entries that differ, all by one code.
    ``agreement``: of the outputs of the file as it is with those of the network, rounding differences having run through all layers.
    """

    requantizations: int
    off: float
    agreement: Agreement


def captured_equals_original(model: torch.nn.Module, network: Network, inputs: Any, tolerance: float = 1e-5) -> float:
    """The network computes what the user's module does, at the size of ``inputs`` and at batches of 1 and 3.

    Returns: the largest difference, relative to the largest value of its output.
    """
    worst = 0.0
    for trial in _sizes(network, inputs):
        with torch.no_grad():
            expected = plain(_call(model, trial))
        got = network.predict(trial)
        _assert_same_structure(expected, got, "the network's outputs")
        worst = max(worst, _gap(flatten(expected)[0], flatten(got)[0]))
    assert worst <= tolerance, f"captured == original: they differ by {worst:.3g} of the largest value; allowed {tolerance:.3g}."
    return worst


def neutral_equals_identity(before: Network, after: Network, inputs: Any, tolerance: float = 1e-6) -> float:
    """A technique with its dial at "change nothing" changed nothing: ``after`` computes what ``before`` does. Returns the difference."""
    worst = 0.0
    for trial in _sizes(before, inputs):
        worst = max(worst, _gap(flatten(before.predict(trial))[0], flatten(after.predict(trial))[0]))
    assert worst <= tolerance, f"neutral == identity: they differ by {worst:.3g} of the largest value; allowed {tolerance:.3g}."
    return worst


def cut_equals_masked(network: Network, dead: Mapping[str, Iterable[int]], inputs: Any, tolerance: float = 1e-5) -> Network:
    """Cutting units equals masking them: what the readers of dead positions take is zero, statistics are over the living (``network.masked``).

    Args:
        dead: axis name -> the units that go, see :func:`downsize.network.lineage.axes`.
        tolerance: of the largest value of an output; axes that are not ``exact`` need about 1e-4.

    Returns: the cut network.
    """
    lineage = Lineage(network)
    oracle, made = masked(lineage, dead), shrunk(lineage, {name: list(units) for name, units in dead.items()})
    for trial in _sizes(network, inputs):
        gap = _gap(flatten(oracle.predict(trial))[0], flatten(made.predict(trial))[0])
        assert gap <= tolerance, f"cut == masked: they differ by {gap:.3g} of the largest value; allowed {tolerance:.3g}."
    return made


def loaded_equals_live(network: Network, inputs: Any, folder: str | Path | None = None) -> Network:
    """Saved and loaded, the network has the same fingerprint and gives the same bits. Returns the loaded one."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        path = Path(inner, "network.safetensors")
        network.save(path)
        loaded = Network.load(path)
    assert loaded.fingerprint() == network.fingerprint(), "loaded == live: the fingerprint of the loaded network differs."
    for trial in _sizes(network, inputs):
        live, again = network.predict(trial), loaded.predict(trial)
        _assert_same_structure(live, again, "the loaded network's outputs")
        for number, (one, two) in enumerate(zip(flatten(live)[0], flatten(again)[0], strict=True)):
            off = int(((one != two) & ((one == one) | (two == two))).sum())  # NaN differs from itself
            assert not off, f"loaded == live: {off} of {one.numel()} entries of output {number} differ."
    return loaded


def simulation_equals_artifact(network: Network, path: str | Path, inputs: Any) -> Simulation:
    """The file at ``path``, written from the quantized ``network``, computes in ONNX Runtime the integers that the network simulates.

    Every requantization is compared on its own: the network is walked, and behind each quantizer the file's codes replace the simulated
    ones, so that a difference counts where it arises. At most 0.5 % of the entries (2 % behind LSTMs that round their states), or one, may
    differ, by one code, and the outputs that then follow from the file's codes may differ by 1e-4 of the largest value. A network without
    quantizers is compared by its outputs.

    Activations that are rounded to 16 bits are compared without that: ONNX Runtime computes in float32. A runtime that does compute in 16 bits
    rounds between the products, too, where the network does not: see :func:`artifact_is_as_near`.

    Inputs of products that round them in blocks by themselves are compared by their blocks' steps.

    Where a product has a quantized weight and a float input, ONNX Runtime rounds that input by itself: then the outputs alone are
    compared, with 2 % allowed. (OpenVINO leaves out requantizations where it can; see :func:`artifact_is_as_near`.)
    """
    inputs, network = _in_torch(inputs), network.fork()
    without_rounding(network)
    outputs, codes = _run_with_codes(Path(path), network, inputs)
    # A file without products that round by themselves has plain operators for blocks, which are compared by the outputs.
    in_kernels = any(len(one) == 1 and one[0].dtype == np.float32 for one in codes)
    names = _quantizers(network, (DYNAMIC, BLOCKS) if in_kernels else (DYNAMIC,))
    assert len(codes) == len(names), f"simulation == artifact: the network has {len(names)} quantizers, the file {len(codes)}: it is of another."
    carried = _reached([node for node in network.graph.nodes if node.target is STATES])
    behind, others = _Counts(STATE_FRACTION), _Counts(CODE_FRACTION)
    hooks = {node: (behind if node in carried else others).hook(node, found) for node, found in zip(names, codes, strict=True)}
    forced = walk(network, network.flat(inputs), hooks)
    rounded_there = _has_float_inputs(network) or (not in_kernels and any(node.target is BLOCKS for node in network.graph.nodes))
    if not rounded_there:
        behind.check()
        others.check()
    allowed = ROUNDED_THERE if rounded_there else FLOAT_TOLERANCE
    gap = _gap(forced, [torch.from_numpy(output) for output in outputs])
    assert gap <= allowed, f"simulation == artifact: from the same codes outputs differ by {gap:.3g} of the largest value; allowed {allowed:.3g}."
    off = (behind.off + others.off) / max(behind.entries + others.entries, 1)
    return Simulation(len(names), off, _agreement(network.predict(inputs), open_artifact(path, "onnxruntime")(inputs)))


def artifact_is_as_near(original: Network, network: Network, path: str | Path, inputs: Any, runtime: str) -> Agreement:
    """The file is as near to the ``original`` network as the simulation in the quantized ``network`` is: by half as much more, and 0.1 %.

    For every runtime, also for those that go on in float where the file has integers, and for those that compute in 16 bits: they round at about
    twice as many places as the network does, by as much, so that errors are sqrt(2) times as large. Returns the file's agreement with the original.
    """
    inputs = _in_torch(inputs)
    expected = original.predict(inputs)
    simulated, real = _agreement(expected, network.predict(inputs)), _agreement(expected, open_artifact(path, runtime)(inputs))
    allowed = 1.5 * simulated.relative_error + 1e-3
    assert real.relative_error <= allowed, (
        f"{runtime}: the file is off by {real.relative_error:.3g}, the simulation by {simulated.relative_error:.3g}; allowed {allowed:.3g}."
    )
    return real


def check_technique(technique: Callable[[Network, Task], Network], network: Network, task: Task, folder: str | Path | None = None) -> Network:
    """The contract of a technique: ``technique(network, task)`` gives a new network that can be used in place of the old one.

    The input network is left as it was; the same call gives the same network; inputs and outputs keep their names, types and structure;
    the result survives saving and loading, becomes a file that runs at batches of 1 and 3, and the file computes what it does.

    Returns: the result. Files are written into ``folder`` (default: a temporary one).
    """
    before = network.fingerprint()
    made = technique(network, task)
    assert network.fingerprint() == before, "the technique changed the network it was given; expected a new one: edit network.fork() or .copy()."
    assert made is not network, "the technique gave back the network it was given; expected a new one: return network.fork()."
    again = technique(network, task)
    assert made.fingerprint() == again.fingerprint(), "two calls with the same network and task gave two networks: fix the random seed."
    assert made.outputs == network.outputs, f"the outputs were {network.outputs}; now they are {made.outputs}."
    assert made.inputs == network.inputs and [(p.name, p.dtype) for p in made.ports] == [(p.name, p.dtype) for p in network.ports], (
        f"the inputs were {[str(p) for p in network.ports]}; now they are {[str(p) for p in made.ports]}."
    )
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        loaded = loaded_equals_live(made, task.example, inner)
        _check_file(loaded, network, task.example, Path(inner, "model.onnx"))
    return made


def _check_file(made: Network, original: Network, example: Any, path: Path) -> None:
    RUNTIMES["onnxruntime"].export(made, path)
    session = open_artifact(path, "onnxruntime")
    for trial in _sizes(made, example):
        expected, got = flatten(original.predict(trial))[0], flatten(session(trial))[0]
        for number, (one, two) in enumerate(zip(expected, got, strict=True)):
            assert one.shape == two.shape and one.dtype == two.dtype, (
                f"output {number} of the file is {two.dtype}{list(two.shape)}; the original network gives {one.dtype}{list(one.shape)}."
            )
            assert not two.is_floating_point() or bool((one.isfinite() <= two.isfinite()).all()), f"output {number} of the file has NaN or infinity."
        simulation_equals_artifact(made, path, trial)


def _sizes(network: Network, inputs: Any) -> list[Any]:
    """The inputs, and, where the batch is open, batches of 1 and 3 made of them; all as torch tensors."""
    inputs = _in_torch(inputs)
    if not any(port.dims and port.dims[0] == "batch" for port in network.ports):
        return [inputs]
    return [inputs, *(batch_of(inputs, [0] * size) for size in BATCHES)]


def _in_torch(inputs: Any) -> Any:
    """The same with torch tensors for numpy arrays."""
    leaves, structure = flatten(inputs)
    return unflatten(structure, [torch.as_tensor(leaf) for leaf in leaves])


def _call(model: torch.nn.Module, inputs: Any) -> Any:
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def _assert_same_structure(expected: Any, got: Any, what: str) -> None:
    one, two = flatten(expected)[1], flatten(got)[1]
    assert one == two, f"{what} have the structure {two}; expected {one}."


def _gap(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference over all outputs, relative to the largest magnitude of its output; infinite where NaN or infinities differ."""
    worst = 0.0
    assert len(expected) == len(got), f"there are {len(got)} outputs; expected {len(expected)}."
    for number, (one, two) in enumerate(zip(expected, got, strict=True)):
        assert one.shape == two.shape, f"output {number} has shape {list(two.shape)}; expected {list(one.shape)}."
        if not one.numel():
            continue
        one, two = one.detach().double(), two.detach().double()
        finite = one.isfinite() & two.isfinite()
        if bool((~finite & (one != two) & ~(one.isnan() & two.isnan())).any()):
            return float("inf")
        scale = float(one[finite].abs().max()) if finite.any() else 0.0
        gap = float((one - two)[finite].abs().max()) if finite.any() else 0.0
        worst = max(worst, gap / max(scale, 1e-30))
    return worst


def _quantizers(network: Network, dynamic: Sequence[object]) -> list[fx.Node]:
    """The quantizers of activations, in the order in which they stand in a file: dynamic ones last, each where it is first read."""
    static = [node for node in network.graph.nodes if node.target is FAKE and constant(network, node.args[0]) is None]
    read = [source for node in network.graph.nodes for source in node.all_input_nodes if source.target in dynamic]
    return static + list(dict.fromkeys(read))


def _has_float_inputs(network: Network) -> bool:
    """Whether a product has a quantized weight (or its transpose) and an input that is not quantized."""
    for fake in network.graph.nodes:
        if fake.target is not FAKE or constant(network, fake.args[0]) is None:
            continue
        readers = {reader for user in fake.users for reader in (user.users if user.target not in PRODUCTS else [user])} | set(fake.users)
        for product in readers:
            sources = [one for one in product.all_input_nodes if one is not fake and fake not in one.all_input_nodes and one.op != "get_attr"]
            if product.target in PRODUCTS and any(one.target not in (FAKE, DYNAMIC, BLOCKS) for one in sources):
                return True
    return False


def _agreement(one: Any, other: Any) -> Agreement:
    comparison = Comparison()
    comparison.add(*([leaf.float() for leaf in flatten(outputs)[0]] for outputs in (one, other)))
    return comparison.agreement()


class _Counts:
    """What differs between the codes of a file and those of the network that is walked with them; ``allowed``: the part that may, by one code."""

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed
        self.entries = self.off = self.worst = 0
        self.where = ""

    def hook(self, node: fx.Node, found: tuple[np.ndarray, ...]) -> Hook:
        codes = torch.from_numpy(found[0]).float()

        def compare(args: tuple[Any, ...], value: Tensor) -> Tensor:
            if node.target is BLOCKS:
                rounded = BLOCKS(codes, args[1])
                self._count(node, ((value - rounded) / block_steps(codes, args[1])).round().abs())
                return rounded
            if node.target is FAKE:
                scale, zero_point = args[1].float(), args[2].float()
            else:
                scale, zero_point = (torch.from_numpy(np.asarray(part)).float() for part in found[1:])
            self._count(node, torch.round(value / scale + zero_point - codes).abs())
            return (codes - zero_point) * scale

        return compare

    def check(self) -> None:
        assert self.worst <= 1, f"simulation == artifact: {self.where} differs by {self.worst} codes; allowed 1."
        off = self.off / max(self.entries, 1)
        assert off <= self.allowed or self.off <= 1, (
            f"simulation == artifact: {off:.2%} of {self.entries} entries differ by a code; allowed {self.allowed:.1%}."
        )

    def _count(self, node: fx.Node, gap: Tensor) -> None:
        self.entries += gap.numel()
        self.off += int((gap > 0).sum())
        if gap.numel() and int(gap.max()) > self.worst:
            self.worst, self.where = int(gap.max()), f"{node.name} ({node.meta.get('module') or 'the model'})"


def _reached(start: list[fx.Node]) -> set[fx.Node]:
    """The nodes that read what these make, directly or through others."""
    found: set[fx.Node] = set()
    while start:
        readers = set(start.pop().users) - found
        found |= readers
        start += readers
    return found


def _run_with_codes(path: Path, network: Network, inputs: Any) -> tuple[list[np.ndarray], list[tuple[np.ndarray, ...]]]:
    """The outputs of a file, and the codes behind every quantizer in it (behind a dynamic one also its scale and zero point)."""
    model = onnx.load(str(path))
    count = len(model.graph.output)
    added: list[tuple[str, ...]] = []
    zeros = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Clip"}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            # The codes of a grid smaller than its type are those behind the clip.
            name = clipped.get(node.output[0], node.output[0])
            added.append((name,))
            model.graph.output.append(helper.make_tensor_value_info(name, zeros[node.input[2]], None))
    seen: dict[tuple[str, str], tuple[str, ...]] = {}
    for node in model.graph.node:
        if (node.op_type, node.input[0] if node.input else "") in seen:
            continue  # layers that read one tensor have a quantizer each, which all give the same
        if node.op_type == "MatMulNBits" and any(one.name == "accuracy_level" and one.i == 4 for one in node.attribute):
            seen[node.op_type, node.input[0]] = (node.input[0],)
            model.graph.output.append(helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None))
        if node.op_type == "DynamicQuantizeLinear":
            seen[node.op_type, node.input[0]] = tuple(node.output)
            kinds = (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8)
            model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in zip(node.output, kinds, strict=True))
    added += seen.values()
    del model.metadata_props[:]  # without its structure the file gives all its outputs, flat
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder, "codes.onnx"))
        session = open_artifact(Path(folder, "codes.onnx"), "onnxruntime")
        results = session.run(session.arrays(tuple(network.flat(inputs))))
    rest = iter(results[count:])
    return results[:count], [tuple(next(rest) for _ in names) for names in added]
