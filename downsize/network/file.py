"""A Network as a file: one safetensors archive whose header holds the graph as JSON.

Pickle-based archives run code when opened; this one is only read. A file is believed only after its checksum, its schema, every
operator (``operators.py``), every argument's type, and a dry run on shapes have been checked.
"""

from __future__ import annotations

import hashlib
import keyword
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import NetworkFileError
from .operators import decode, encode, name_of, target_of
from .parts import Port, assign

VERSION = 1
KEY = "downsize.network"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NodeRecord(_Strict):
    """One node of the graph: ``op`` as in torch.fx, ``target`` as ``operators.name_of`` spells it, or the tensor's name."""

    name: str
    op: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    module: str
    source: str


class PortRecord(_Strict):
    """One input: dimensions are numbers, or symbols for any size; ``example`` holds sizes that are known to work."""

    name: str
    dtype: str
    dims: list[int | str]
    example: list[int]


class NetworkRecord(_Strict):
    """The whole header."""

    version: int
    nodes: list[NodeRecord]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    ports: list[PortRecord]
    aliases: dict[str, str]
    trainable: list[str]
    origin: dict[str, Any]


class Description(NamedTuple):
    """What a file says of a network beside its tensors."""

    graph: fx.Graph
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    ports: tuple[Port, ...]
    origin: dict[str, Any]


class Loaded(NamedTuple):
    """What a file gives: the fields of a Network, in its order."""

    graph_module: fx.GraphModule
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    ports: tuple[Port, ...]
    origin: dict[str, Any]


def describe(network: Description, named: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The graph as JSON text, and the tensors by name, each once: a tensor with two names is an alias in the text."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in sorted(named.items()):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    record = NetworkRecord(
        version=VERSION,
        nodes=[_node_record(node) for node in network.graph.nodes],
        inputs=network.inputs,
        outputs=network.outputs,
        ports=[PortRecord(name=p.name, dtype=str(p.dtype).removeprefix("torch."), dims=list(p.dims), example=list(p.example)) for p in network.ports],
        aliases=aliases,
        trainable=sorted(name for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad),
        origin=network.origin,
    )
    return record.model_dump_json(), tensors


def _node_record(node: fx.Node) -> NodeRecord:
    target = name_of(node.target) if node.op == "call_function" else str(node.target)
    return NodeRecord(
        name=node.name,
        op=node.op,
        target=target,
        args=[encode(argument) for argument in node.args],
        kwargs={key: encode(value) for key, value in node.kwargs.items()},
        module=node.meta.get("module", ""),
        source=node.meta.get("source", ""),
    )


def save(network: Description, named: dict[str, Tensor], path: Path) -> None:
    """Write a network to ``path`` through a temporary file beside it, so that the file is whole or absent."""
    graph, tensors = describe(network, named)
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kept = tensor.detach().contiguous()
        # Two tensors that are views of one storage are written apart: safetensors refuses shared memory.
        plain[name] = kept.clone() if kept.untyped_storage().nbytes() != kept.numel() * kept.element_size() else kept
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(plain, temporary, metadata={KEY: graph, "sha256": checksum(graph, plain)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def checksum(graph: str, tensors: dict[str, Tensor]) -> str:
    """sha256 (hex) over a network's description and every tensor's name, type, shape and values."""
    digest = hashlib.sha256(graph.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def load(path: Path) -> Loaded:
    """Read a network file.

    Raises:
        NetworkFileError: it is missing, damaged, forged, or made by another version of the format.
    """
    graph, expected, tensors = _read(path)
    if expected != checksum(graph, tensors):
        raise NetworkFileError(f"{path} is damaged: its checksum does not match. Make it again, or copy it again from where it was made.")
    try:
        record = NetworkRecord.model_validate_json(graph)
    except ValidationError as error:
        raise NetworkFileError(f"{path} is not a network of format {VERSION}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}.") from None
    if record.version != VERSION:
        raise NetworkFileError(f"{path} has format {record.version}; this version of downsize reads {VERSION}: use the version that made it.")
    try:
        return _build(record, tensors)
    except NetworkFileError as error:
        raise NetworkFileError(f"{path}: {error}") from None
    except RecursionError:
        raise NetworkFileError(f"{path} is nested too deeply: it is damaged or forged.") from None


def _read(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as archive:
            metadata = archive.metadata() or {}
            # Cloned: tensors in the mapped file are not aligned as live ones, and kernels then round differently.
            tensors = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise NetworkFileError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise NetworkFileError(f"{path} is not a network file: {error}. It is damaged, or not made by Network.save.") from None
    if KEY not in metadata or "sha256" not in metadata:
        raise NetworkFileError(f"{path} is a safetensors file without a network in it: expected a file made by Network.save.")
    return metadata[KEY], metadata["sha256"], tensors


def _build(record: NetworkRecord, tensors: dict[str, Tensor]) -> Loaded:
    named = _named_tensors(record, tensors)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in record.nodes:
        if not item.name.isidentifier() or keyword.iskeyword(item.name) or item.name in nodes:
            raise NetworkFileError(f"node {item.name!r} has a bad or repeated name: the file is damaged.")
        nodes[item.name] = _add(graph, item, nodes, named)
        nodes[item.name].meta = {"module": item.module, "source": item.source}
    ports = tuple(_port(item) for item in record.ports)
    if [n.op for n in graph.nodes].count("output") != 1 or [n.name for n in graph.nodes if n.op == "placeholder"] != [p.name for p in ports]:
        raise NetworkFileError("the inputs or outputs do not fit the graph: the file is damaged.")
    try:
        module = fx.GraphModule(_root(named), graph)
        graph.lint()
    except (RuntimeError, AttributeError, SyntaxError, ValueError, TypeError, KeyError) as error:
        raise NetworkFileError(f"the graph is not whole ({error}): the file is damaged.") from None
    made = Loaded(module, record.inputs, record.outputs, ports, record.origin)
    _check_structures(made)
    _dry_run(made)
    return made


def _named_tensors(record: NetworkRecord, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        _check_name(name)
        if name in record.trainable and not tensor.is_floating_point():
            raise NetworkFileError(f"tensor {name!r} is {tensor.dtype} and called trainable: the file is damaged.")
        named[name] = torch.nn.Parameter(tensor) if name in record.trainable else tensor
    for name, first in record.aliases.items():
        _check_name(name)
        if first not in tensors or name in tensors:
            raise NetworkFileError(f"tensor {name!r} is said to be the same as {first!r}: the file is damaged.")
        named[name] = named[first]
    return named


def _root(named: dict[str, Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, tensor in named.items():
        assign(root, name, tensor)
    return root


def _check_name(name: str) -> None:
    """Tensor names become attributes of modules: a name that would hide one of torch's own is refused."""
    parts = name.split(".")
    if not all(part and part.replace("_", "a").isalnum() for part in parts) or any(hasattr(torch.nn.Module, part) for part in parts):
        raise NetworkFileError(f"tensor name {name!r} is not a name: the file is damaged.")


def _port(item: PortRecord) -> Port:
    dtype = getattr(torch, item.dtype, None)
    sizes_fit = len(item.dims) == len(item.example) and all(
        0 < size < 2**31 and (isinstance(d, str) or d == size) for d, size in zip(item.dims, item.example, strict=False)
    )
    if not isinstance(dtype, torch.dtype) or not sizes_fit:
        raise NetworkFileError(f"input {item.name!r} is {item.dtype}{item.dims}: the file is damaged.")
    return Port(item.name, dtype, tuple(item.dims), tuple(item.example))


def _add(graph: fx.Graph, item: NodeRecord, nodes: dict[str, fx.Node], tensors: dict[str, Tensor]) -> fx.Node:
    args = tuple(decode(value, nodes) for value in item.args)
    kwargs = {key: decode(value, nodes) for key, value in item.kwargs.items()}
    if item.op == "placeholder":
        return graph.create_node("placeholder", item.name, (), {}, name=item.name)
    if item.op == "get_attr":
        if item.target not in tensors:
            raise NetworkFileError(f"node {item.name!r} reads {item.target!r}, which is not in the file.")
        return graph.create_node("get_attr", item.target, (), {}, name=item.name)
    if item.op == "output":
        if len(args) != 1 or not isinstance(args[0], tuple) or not all(isinstance(value, fx.Node) for value in args[0]):
            raise NetworkFileError("the output is not a tuple of nodes: the file is damaged.")
        return graph.create_node("output", "output", args, {}, name=item.name)
    if item.op != "call_function":
        raise NetworkFileError(f"node {item.name!r} is a {item.op!r}: the file is damaged or forged.")
    return graph.create_node("call_function", target_of(item.target), args, kwargs, name=item.name)


def _check_structures(network: Loaded) -> None:
    outputs = next(node for node in network.graph_module.graph.nodes if node.op == "output").args[0]
    for structure, count, what in ((network.inputs, len(network.ports), "inputs"), (network.outputs, len(outputs), "outputs")):  # type: ignore[arg-type]
        if _count_tensors(structure) != count:
            raise NetworkFileError(f"the structure of the {what} does not fit the graph: the file is damaged.")


def _count_tensors(node: Any) -> int:
    if not isinstance(node, dict) or node.get("kind") not in ("tensor", "constant", "tuple", "list", "dict"):
        raise NetworkFileError(f"a structure reads {node!r}: the file is damaged.")
    if node["kind"] in ("tensor", "constant"):
        if set(node) != ({"kind"} if node["kind"] == "tensor" else {"kind", "value"}):
            raise NetworkFileError(f"a structure reads {node!r}: the file is damaged.")
        return int(node["kind"] == "tensor")
    items = node.get("items")
    keys = node.get("keys")
    if not isinstance(items, list) or (node["kind"] == "dict") != isinstance(keys, list):
        raise NetworkFileError(f"a structure reads {node!r}: the file is damaged.")
    if isinstance(keys, list) and (len(keys) != len(items) or not all(isinstance(key, str) for key in keys)):
        raise NetworkFileError(f"a structure reads {node!r}: the file is damaged.")
    return sum(_count_tensors(item) for item in items)


def _dry_run(network: Loaded) -> None:
    """Run the graph on shapes alone: proves that every operator takes what it is given, without computing or allocating anything."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            leaves = [torch.empty(port.example, dtype=port.dtype) for port in network.ports]
            results = network.graph_module(*leaves)
    except Exception as error:  # every operator raises its own kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NetworkFileError(f"the graph does not run ({line}): the file is damaged or forged.") from None
    if not all(isinstance(result, Tensor) for result in results):
        raise NetworkFileError("an output is not a tensor: the file is damaged.")
