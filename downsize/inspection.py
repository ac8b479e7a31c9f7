"""Where the parameters, MACs, bytes and milliseconds of a model are, layer by layer; and the numbers of one file."""

from __future__ import annotations

import ast
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ArtifactError
from .facts import Agreement, Measurement
from .measure import energy, latency, memory, per_operator, size
from .measure.process import label
from .runtimes import OperatorTime, Session, open_artifact, require
from .structure import Structure, unflatten
from .target import Target

if TYPE_CHECKING:
    from .network.network import Network
    from .task import Task

MODEL = "(model)"
OUTSIDE = "(no layer)"  # what the runtime adds itself, such as changes of memory layout
PASSED_ON = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity", "Unsqueeze")
HEAVY = ("Conv", "Gemm", "MatMul", "Pool", "LSTM", "GRU", "Softmax", "LayerNorm", "Gather")
SEVERAL_NAMES = {"FullyConnected": ("Gemm", "MatMul"), "Convolution": ("Conv",), "GroupConvolution": ("Conv",), "Gemm": ("Gemm", "MatMul")}
COUNTED = ("Conv", "Gemm", "MatMul")
# They move data or make shapes: nothing to count, nothing to report.
FREE = (
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Concat", "Split", "Slice", "Expand", "Pad", "Shape"),
    *("Constant", "ConstantOfShape", "Range", "Dropout", "Tile", "DepthToSpace", "SpaceToDepth"),
)
STEPS_BACK = 8
INT64 = 7  # TensorProto.INT64


@dataclass
class Layer:
    """One row: a module path and what lies under it. ``macs`` is None where nothing in it has a count, ``seconds`` where nothing ran."""

    module: str
    operators: list[str] = field(default_factory=list)
    parameters: int = 0
    macs: int | None = None
    bytes: int = 0
    seconds: float | None = None

    def add(self, operator: str, parameters: int = 0, macs: int | None = None, bytes: int = 0, seconds: float | None = None) -> None:
        """Count one operator of the layer, or one node that the runtime ran for it."""
        if operator and operator not in self.operators:
            self.operators.append(operator)
        self.parameters += parameters
        self.bytes += bytes
        self.macs = self.macs if macs is None else (self.macs or 0) + macs
        self.seconds = self.seconds if seconds is None else (self.seconds or 0.0) + seconds


@dataclass(frozen=True)
class Inspection:
    """The rows in graph order, the operators that have no count of MACs (with how often they occur), and where the time was measured."""

    name: str
    layers: list[Layer]
    not_counted: dict[str, int]
    where: str | None


class Layers:
    """Rows by module path, cut to ``depth`` levels."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.rows: dict[str, Layer] = {}

    def of(self, module: str) -> Layer:
        """The row of a module path."""
        path = ".".join(module.split(".")[: self.depth]) or MODEL
        return self.rows.setdefault(path, Layer(path))

    def time(self, graph: FileGraph, ran: Iterable[OperatorTime]) -> None:
        """Add the time of every node that ran to the layer it comes from; what comes from none has a row of its own."""
        for item in ran:
            node = graph.owner(item)
            row = self.rows.setdefault(OUTSIDE, Layer(OUTSIDE)) if node is None else self.of(node.module)
            row.add(item.operator if node is None else "", seconds=item.seconds)
        if OUTSIDE in self.rows:
            self.rows[OUTSIDE] = self.rows.pop(OUTSIDE)  # last


def look(what: str, target: Target, depth: int = 99, time: bool = True, length: int = 128) -> Inspection:
    """Inspect a task file, an ONNX file or a saved network, with ``target.batch`` samples; open dimensions of a file are ``length``.

    Raises:
        TaskError, CaptureError, NetworkFileError, ArtifactError, RuntimeMissing: what cannot be read, captured or run.
    """
    if Path(what).suffix == ".onnx":
        return _look_at_file(Path(what), target, depth, time, length)
    network, inputs = _network_of(what, target.batch)
    from .network.cost import count

    cost = count(network, inputs)
    layers = Layers(depth)
    for row in cost.rows:
        layers.of(row.module).add(row.operator.removeprefix("aten.").removesuffix(".default"), row.parameters, row.macs, row.bytes)
    where = None
    if time:
        runtime = require(target.runtime)
        with tempfile.TemporaryDirectory(prefix="downsize-") as folder:
            path = Path(folder, f"model{runtime.suffix}")
            runtime.export(network, path)
            layers.time(FileGraph(path), per_operator(path, inputs, target.runtime, target.threads))
            where = label(target.runtime)
    return Inspection(what, list(layers.rows.values()), dict(cost.not_counted), where)


def _network_of(what: str, batch: int) -> tuple[Network, Any]:
    from .network.network import Network

    if Path(what).suffix == ".py":
        from .network.capture import capture
        from .task import load_task

        task = load_task(what)
        return capture(task.model, task.example, more=task.variations()), _inputs_of(task, batch)
    network = Network.load(what)
    sizes = [
        [batch if i == 0 and isinstance(dim, str) else n for i, (dim, n) in enumerate(zip(p.dims, p.example, strict=True))] for p in network.ports
    ]
    dtypes = [str(port.dtype).removeprefix("torch.") for port in network.ports]
    arrays = [made_up(shape, dtype) for shape, dtype in zip(sizes, dtypes, strict=True)]
    return network, _as_given(network.inputs, arrays)


def _inputs_of(task: Task, batch: int) -> Any:
    from .network.network import batch_of

    first, _ = next(task.batches("calibrate"))
    return batch_of(first, [0] * batch)


def _as_given(structure: Structure, arrays: list[np.ndarray]) -> Any:
    """Arrays as a batch's inputs: positions, or keywords."""
    args, kwargs = unflatten(structure, arrays)
    return kwargs or tuple(args)


def made_up(shape: Sequence[int], dtype: str) -> np.ndarray:
    """An input that any model takes: normal random floats, zeros for whole numbers (they may be indices), True for masks."""
    if dtype.startswith("float"):
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.ones(shape, dtype) if dtype == "bool" else np.zeros(shape, dtype)


# Files ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node of an ONNX file."""

    name: str
    operator: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class FileGraph:
    """The nodes and weights of the ONNX file at ``path``; with the shapes of ``inputs`` (name: shape) also the shapes of all values.

    Raises:
        ArtifactError: it is no ONNX file.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Sequence[int]] | None = None) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        try:
            model = onnx.load(str(path), load_external_data=False)
        except (DecodeError, OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read as an ONNX file ({error}): write or copy it again.") from error
        self.nodes = [
            Node(node.name, node.op_type, _module(node, model.producer_name == "downsize"), tuple(node.input), tuple(node.output))
            for node in model.graph.node
        ]
        self.weights = {item.name: item for item in model.graph.initializer}
        self.shapes = {name: tuple(item.dims) for name, item in self.weights.items()}
        self.makers = {output: node for node in self.nodes for output in node.outputs}
        self.names = {**self.makers, **{node.name: node for node in self.nodes if node.name}}
        self.readers: dict[str, Node] = {}
        for node in self.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, node)
        if inputs is not None:
            self.shapes |= _inferred(model, inputs)

    def owner(self, ran: OperatorTime) -> Node | None:
        """The node that something the runtime ran comes from; runtimes rename what they fuse ("relu_nchwc", "0:Conv_1/WithoutBiases")."""
        found = self.names.get(ran.node)
        if found is None:
            inside = [name for name in self.names if _is_part(name, ran.node)]
            found = self.names[max(inside, key=len)] if inside else None
        return None if found is None else self._heavy(found, ran.operator)

    def _heavy(self, node: Node, operator: str) -> Node:
        """A fused convolution bears the name of its activation: go back to the convolution."""
        kinds = SEVERAL_NAMES.get(operator) or tuple(kind for kind in HEAVY if kind in operator)
        back: Node | None = node
        for _ in range(STEPS_BACK if kinds else 0):
            if back is None or any(kind in back.operator for kind in kinds):
                return back or node
            back = next((self.makers[name] for name in back.inputs if name in self.makers), None)
        return node

    def layer_of(self, weight: str) -> Node | None:
        """The node that uses a weight, past the nodes that only decode or reshape it."""
        node = self.readers.get(weight)
        for _ in range(STEPS_BACK):
            if node is None or node.operator not in PASSED_ON or not node.outputs or node.outputs[0] not in self.readers:
                break
            node = self.readers[node.outputs[0]]
        return node

    def macs(self, node: Node) -> int | None:
        """Multiply-accumulates of a node: 0 where it only moves data, None where there is no rule or no shape to count by."""
        if not any(kind in node.operator for kind in COUNTED):
            return 0 if node.operator in FREE else None
        left, out = self.shapes.get(node.inputs[0]), self.shapes.get(node.outputs[0])
        weight = self.shapes.get(node.inputs[3 if node.operator.startswith("QLinear") else 1])
        if not left or not out or not weight:
            return None
        if "Conv" in node.operator:
            return math.prod(left if "Transpose" in node.operator else out) * math.prod(weight[1:])
        return math.prod(out) * (math.prod(left) // out[0] if "Gemm" in node.operator else left[-1])

    def count(self, layers: Layers) -> dict[str, int]:
        """Fill in the parameters, bytes and MACs of all layers; the operators without a count, and how often they occur."""
        not_counted: Counter[str] = Counter()
        for node in self.nodes:
            macs = self.macs(node)
            if macs is None:
                not_counted[node.operator] += 1
            layers.of(node.module).add(node.operator, macs=macs)
        for name, weight in self.weights.items():
            node = self.layer_of(name)
            elements = math.prod(weight.dims)
            layers.of(node.module if node else "").add("", elements if self._is_parameter(name) else 0, bytes=_bytes_of(weight, elements))
        return dict(not_counted)

    def macs_by_type(self) -> dict[str, int]:
        """Multiply-accumulates by the type that they are computed in: int8 where both operands are decoded from 8 bits, else float32."""
        macs = {"int8": 0, "float32": 0}
        for node in self.nodes:
            makers = [self.makers.get(name) for name in node.inputs[:2]]
            decoded = all(maker is not None and maker.operator == "DequantizeLinear" for maker in makers)
            integer = decoded or "Integer" in node.operator or node.operator.startswith("QLinear")
            macs["int8" if integer else "float32"] += self.macs(node) or 0
        return macs

    def weight_bytes(self) -> int:
        """Bytes of all weights, which one call reads at least once."""
        return sum(_bytes_of(weight, math.prod(weight.dims)) for weight in self.weights.values())

    def _is_parameter(self, name: str) -> bool:
        """Scales, zero points, bounds and the whole numbers that hold shapes and axes are not parameters of the model."""
        node = self.readers.get(name)
        is_grid = node is not None and "quantize" in node.operator.lower() and node.inputs[0] != name
        return not is_grid and self.weights[name].data_type != INT64 and len(self.weights[name].dims) > 0


def _bytes_of(weight: Any, elements: int) -> int:
    from onnx import TensorProto, helper

    if weight.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-elements // 2)
    return elements * helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize


def _module(node: Any, ours: bool) -> str:
    """The user's module path of a node, as far as its name or its exporter's notes tell it; else its own name."""
    if ours:
        return node.name.rpartition(":")[0]
    if node.name.startswith("/"):  # torch's older exporter: /layer1/layer1.0/conv1/Conv
        return ".".join(node.name.split("/")[1:-1]) or node.name
    scopes = next((item.value for item in node.metadata_props if item.key == "pkg.torch.onnx.name_scopes"), None)
    try:
        names = ast.literal_eval(scopes or "")
        return names[-2] or node.name
    except (ValueError, SyntaxError, IndexError, TypeError):
        return node.name


def _inferred(model: Any, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes of all values for the given input shapes, as far as ONNX's own rules find them."""
    import onnx

    for value in model.graph.input:
        if value.name in inputs:
            for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True):
                dim.dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return {}
    shapes = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.value_info, *graph.output]}
    return {name: tuple(shape) for name, shape in shapes.items() if shape and all(shape)}


def _is_part(name: str, text: str) -> bool:
    """Whether ``name`` stands in ``text`` as a whole word, not as the beginning of another number or name."""
    at = text.find(name)
    after = text[at + len(name) :][:1]
    return len(name) > 1 and at >= 0 and not (at and text[at - 1].isalnum()) and not after.isalnum()


def _look_at_file(path: Path, target: Target, depth: int, time: bool, length: int) -> Inspection:
    session = open_artifact(path, target.runtime, target.threads)
    arrays = made_up_inputs(session, target.batch, length)
    graph = FileGraph(path, {name: array.shape for name, array in arrays.items()})
    layers = Layers(depth)
    not_counted = graph.count(layers)
    if time:
        layers.time(graph, per_operator(path, arrays, target.runtime, target.threads))
    return Inspection(str(path), list(layers.rows.values()), not_counted, label(target.runtime) if time else None)


def made_up_inputs(session: Session, batch: int, length: int) -> dict[str, np.ndarray]:
    """Inputs in the shapes that a file asks for: a first open dimension is ``batch``, any other ``length``.

    Raises:
        ArtifactError: an input has no known rank.
    """
    arrays = {}
    for name, shape, dtype in zip(session.input_names, session.input_shapes, session.input_dtypes, strict=True):
        if shape is None:
            raise ArtifactError(f"input {name!r} of the file takes any shape, so that none can be made up: give a task, which brings inputs.")
        sizes = [dim if isinstance(dim, int) else (length if axis else batch) for axis, dim in enumerate(shape)]
        arrays[name] = made_up(sizes, dtype)
    return arrays


def measure_file(
    path: Path, target: Target, task_file: str | None, baseline: Path | None, seconds: float, length: int = 128
) -> tuple[dict[str, Measurement], Agreement | None]:
    """The numbers of one file: size, latency (and its ratio to ``baseline``), memory, energy; with a task its score beside the original's.

    Raises:
        ArtifactError: the file cannot be opened or does not fit the task's inputs. TaskError: the task cannot be used.
    """
    session = open_artifact(path, target.runtime, target.threads)
    agreement, scores = None, {}
    if task_file is None:
        inputs: Any = made_up_inputs(session, target.batch, length)
    else:
        from .measure.score import judge
        from .task import load_task

        task = load_task(task_file)
        task.check()
        inputs = _inputs_of(task, target.batch)
        found = judge(task.predict, session, task.score, task.batches(task.verdict_role))
        scores, agreement = found.measurements, found.agreement
    where = (inputs, target.runtime, target.threads)
    shapes = dict(zip(session.input_names, (array.shape for array in session.arrays(inputs)), strict=True))
    graph = FileGraph(path, shapes)
    numbers = {"size": size(path), **latency(path, *where, baseline=baseline, seconds=seconds), "memory": memory(path, *where)}
    numbers["energy"] = energy(graph.macs_by_type(), graph.weight_bytes(), path, *where)
    return {**numbers, **scores}, agreement
