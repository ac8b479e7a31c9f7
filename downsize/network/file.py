"""A Network as a file: one safetensors archive whose header holds the graph as JSON.

Pickle-based archives run code when opened; this one is only read. A file is believed only after its checksum, its schema, every
operator (``operators.py``), every name and argument, and a dry run on shapes (``trust.py``) have been checked.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from ..errors import NetworkFileError
from .operators import decode, encode, name_of, target_of
from .parts import Port, assign, is_name
from .trust import check_call, check_growth, check_structure, dry_run, is_node_name

VERSION = 1
KEY = "downsize.network"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


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
    """The whole header.

    ``aliases`` maps a further name of a tensor to its first; ``parameters`` says of each parameter whether it trains; ``layouts`` has, for
    tensors that are not stored row by row (channels last), their dimensions from the outermost in memory: kernels round by it. ``sparse``
    has, for tensors whose zeros must stay, how many of their values are not zero.
    """

    version: int
    nodes: list[NodeRecord]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    ports: list[PortRecord]
    aliases: dict[str, str]
    parameters: dict[str, bool]
    layouts: dict[str, list[int]]
    origin: dict[str, Any]
    sparse: dict[str, int] = {}


class Description(NamedTuple):
    """What a file says of a network beside its tensors."""

    graph: fx.Graph
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    ports: tuple[Port, ...]
    origin: dict[str, Any]
    sparse: dict[str, int]


class Loaded(NamedTuple):
    """What a file gives: the fields of a Network, in its order."""

    graph_module: fx.GraphModule
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    ports: tuple[Port, ...]
    origin: dict[str, Any]
    sparse: dict[str, int]


def describe(network: Description, named: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The graph as JSON text, and the tensors by name, each once: a tensor with two names is an alias in the text.

    Raises NetworkFileError when a tensor whose zeros must stay has fewer of them than it had.
    """
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
        parameters={name: tensor.requires_grad for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)},
        layouts={name: order for name, tensor in tensors.items() if (order := _layout(tensor)) != sorted(order)},
        origin=network.origin,
        sparse={name: _nonzeros(name, named[name], most) for name, most in sorted(network.sparse.items()) if name in named},
    )
    return record.model_dump_json(), tensors


def _nonzeros(name: str, tensor: Tensor, most: int) -> int:
    """How many values are not zero; NetworkFileError if they are more than ``most``."""
    count = int(torch.count_nonzero(tensor))
    if count > most:
        raise NetworkFileError(
            f"the sparse tensor {name!r} has {count} of {tensor.numel()} values that are not zero; at most {most} may be: a step revived "
            "zeros, so multiply by network.masks() after each change of the weights."
        )
    return count


def _layout(tensor: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost; in order for a tensor that has gaps or overlaps."""
    order = list(range(tensor.dim()))
    by_stride = sorted(order, key=lambda d: -tensor.stride(d))
    return by_stride if not tensor.is_contiguous() and tensor.permute(by_stride).is_contiguous() else order


def _laid_out(tensor: Tensor, order: list[int]) -> Tensor:
    if sorted(order) != list(range(tensor.dim())):
        raise NetworkFileError(f"a tensor of {tensor.dim()} dimensions is laid out as {order}: the file is damaged.")
    return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])


def _node_record(node: fx.Node) -> NodeRecord:
    target = name_of(node.target) if node.op == "call_function" else node.name if node.op == "placeholder" else str(node.target)
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
    """Write a network to ``path`` through a temporary file beside it, so that the file is whole or absent.

    Raises:
        NetworkFileError: the file cannot be written.
    """
    graph, tensors = describe(network, named)
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().contiguous()
        # Tensors that are views of one storage are written apart: safetensors refuses shared memory.
        storage = kept.untyped_storage()
        shared = storage.nbytes() != kept.numel() * kept.element_size() or storage.data_ptr() in storages
        storages.add(storage.data_ptr())
        plain[name] = kept.clone() if shared else kept
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        # One key: safetensors writes several in any order, and equal networks must give equal bytes.
        save_file(plain, temporary, metadata={KEY: f"{checksum(graph, plain)}\n{graph}"})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise NetworkFileError(f"{path} cannot be written ({error}): give a folder that exists and can be written, with room.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


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
    try:
        if expected != checksum(graph, tensors):
            raise NetworkFileError("its checksum does not match: it is damaged. Make it again, or copy it again from where it was made.")
        return rebuild(graph, tensors)
    except NetworkFileError as error:
        raise NetworkFileError(f"{path}: {_shown(error)}") from None


def _shown(error: BaseException) -> str:
    """An error's message as a screen can show it: what a forged file says may be long, or written to confuse a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return text if len(text) <= 500 else f"{text[:400]} [...] {text[-100:]}"


def rebuild(graph: str, tensors: dict[str, Tensor]) -> Loaded:
    """The inverse of :func:`describe`, with every check that a file gets. Raises NetworkFileError."""
    try:
        record = NetworkRecord.model_validate_json(graph)
        if record.version != VERSION:
            raise NetworkFileError(f"it has format {record.version}; this version of downsize reads {VERSION}: use the version that made it.")
        return _build(record, tensors)
    except ValidationError as error:
        raise NetworkFileError(f"it is not a network of format {VERSION}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}.") from None
    except RecursionError:
        raise NetworkFileError("it is nested too deeply: it is damaged or forged.") from None


def _read(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as archive:
            metadata = archive.metadata() or {}
            # Cloned: tensors in the mapped file are not aligned as live ones, and kernels then round differently.
            tensors = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise NetworkFileError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise NetworkFileError(f"{path} is not a network file: {_shown(error)}. It is damaged, or not made by Network.save.") from None
    if "\n" not in metadata.get(KEY, ""):
        raise NetworkFileError(f"{path} is a safetensors file without a network in it: expected a file made by Network.save.")
    expected, _, graph = metadata[KEY].partition("\n")
    return graph, expected, tensors


def _build(record: NetworkRecord, tensors: dict[str, Tensor]) -> Loaded:
    ports = tuple(_port(item) for item in record.ports)
    named = _named_tensors(record, tensors)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in record.nodes:
        if not is_node_name(item.name) or item.name in nodes:
            raise NetworkFileError(f"node {item.name!r} has a bad or repeated name: the file is damaged.")
        nodes[item.name] = _add(graph, item, nodes, named)
        # torch.fx renames what would hide a name of its own.
        if nodes[item.name].name != item.name:
            raise NetworkFileError(f"node {item.name!r} has the name of something else: the file is damaged or forged.")
        nodes[item.name].meta = {"module": item.module, "source": item.source}
    inputs, operations = [n.name for n in graph.nodes if n.op == "placeholder"], [item.op for item in record.nodes]
    if operations.count("output") != 1 or operations[-1] != "output" or inputs != [port.name for port in ports]:
        raise NetworkFileError("the inputs or outputs do not fit the graph: the file is damaged.")
    check_structure(record.inputs, len(ports), "inputs")
    check_structure(record.outputs, len(nodes[record.nodes[-1].name].args[0]), "outputs")
    check_growth(graph)
    try:
        graph.lint()
        module = fx.GraphModule(_root(named), graph)
    except Exception as error:  # torch.fx raises every kind
        raise NetworkFileError(f"the graph is not whole ({error}): the file is damaged.") from None
    dry_run(module, ports)
    return Loaded(module, record.inputs, record.outputs, ports, record.origin, dict(record.sparse))


def _named_tensors(record: NetworkRecord, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        tensor = _laid_out(stored, record.layouts[name]) if name in record.layouts else stored
        trains = record.parameters.get(name, False)
        if trains and not (tensor.is_floating_point() or tensor.is_complex()):
            raise NetworkFileError(f"tensor {name!r} is {tensor.dtype} and called trainable: the file is damaged.")
        named[name] = torch.nn.Parameter(tensor, requires_grad=trains) if name in record.parameters else tensor
    for name, first in record.aliases.items():
        if first not in tensors or name in tensors:
            raise NetworkFileError(f"tensor {name!r} is said to be the same as {first!r}: the file is damaged.")
        named[name] = named[first]
    folders = {name[:i] for name in named for i, letter in enumerate(name) if letter == "."}
    for name in named:
        if not is_name(name) or name in folders:
            raise NetworkFileError(f"tensor name {name!r} is not a name: the file is damaged.")
    if unknown := ((set(record.parameters) | set(record.layouts)) - set(tensors)) | (set(record.sparse) - set(named)):
        raise NetworkFileError(f"tensor {sorted(unknown)[0]!r} is not in the file: it is damaged.")
    for name, most in record.sparse.items():
        _nonzeros(name, named[name], most)
    return named


def _root(named: dict[str, Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, tensor in named.items():
        assign(root, name, tensor)
    return root


def _port(item: PortRecord) -> Port:
    dtype = getattr(torch, item.dtype, None)
    sizes_fit = len(item.dims) == len(item.example) and all(
        0 < size < 2**31 and (is_node_name(d) if isinstance(d, str) else d == size) for d, size in zip(item.dims, item.example, strict=False)
    )
    if not isinstance(dtype, torch.dtype) or not sizes_fit:
        raise NetworkFileError(f"input {item.name!r} is {item.dtype}{item.dims}: the file is damaged.")
    return Port(item.name, dtype, tuple(item.dims), tuple(item.example))


def _add(graph: fx.Graph, item: NodeRecord, nodes: dict[str, fx.Node], tensors: dict[str, Tensor]) -> fx.Node:
    args = tuple(decode(value, nodes) for value in item.args)
    kwargs = {key: decode(value, nodes) for key, value in item.kwargs.items()}
    if item.op == "call_function":
        target = target_of(item.target)
        check_call(target, args, kwargs)
        return graph.create_node("call_function", target, args, kwargs, name=item.name)
    if kwargs or (args and item.op != "output"):
        raise NetworkFileError(f"node {item.name!r} has arguments that a {item.op!r} does not take: the file is damaged or forged.")
    if item.op == "placeholder" and item.target == item.name:
        return graph.create_node("placeholder", item.name, (), {}, name=item.name)
    if item.op == "get_attr" and item.target in tensors:
        return graph.create_node("get_attr", item.target, (), {}, name=item.name)
    if item.op == "output":
        if len(args) != 1 or not isinstance(args[0], tuple) or not all(isinstance(value, fx.Node) for value in args[0]):
            raise NetworkFileError("the output is not a tuple of nodes: the file is damaged.")
        return graph.create_node("output", "output", args, {}, name=item.name)
    raise NetworkFileError(f"node {item.name!r} is a {item.op!r} of {item.target!r}, which is not in the file: it is damaged or forged.")
