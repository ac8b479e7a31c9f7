"""What a graph from anywhere must pass before it is believed: its calls, its names, its structures, and a dry run on shapes.

torch.fx writes names and literals into Python source and runs it. So every name is checked to be nothing but a name before a
GraphModule is made, and what a graph would do is proved on shapes alone, one operator at a time, without computing or allocating.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import keyword
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import NetworkFileError
from ..structure import Structure
from .operators import SYMBOLIC_NAME
from .parts import Port
from .quiet import quiet

# Products of sizes can grow without end in Python; no model's shapes need more.
LARGEST_INTEGER_BITS = 1024
# No tensor at the example's sizes is larger (4 GiB), and no operator gives more of them.
LARGEST_TENSOR_BYTES = 2**32
MOST_TENSORS = 2**16
_GROUPED = (torch.ops.downsize.fake_quantize_groups.default, torch.ops.downsize.fake_quantize_levels.default)
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_node_name(name: str) -> bool:
    """Whether ``name`` can name a value in the source that torch.fx makes of a graph."""
    return _NODE_NAME.fullmatch(name) is not None and not keyword.iskeyword(name) and name != "self"


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the arguments of a call, as far as that can be done without running it.

    Raises:
        NetworkFileError: a keyword that is no argument of the operator, or an operand of shape arithmetic that is not a number.
    """
    if isinstance(target, torch._ops.OpOverload):
        unknown = sorted(set(kwargs) - {argument.name for argument in target._schema.arguments})
        if unknown:
            raise NetworkFileError(f"{target} has no argument {unknown[0]!r}: the file is damaged or forged.")
        return
    if target is operator.getitem:
        sound = len(args) == 2 and isinstance(args[0], fx.Node) and type(args[1]) is int
    else:
        sound = all(isinstance(value, (bool, int, float, fx.Node)) for value in _operands(target, args))
    if target is operator.pow:
        sound = sound and len(args) == 2 and isinstance(args[1], (int, float)) and abs(args[1]) <= 16
    if kwargs or not sound:
        raise NetworkFileError(f"{SYMBOLIC_NAME[target]} is given {args}, which is no arithmetic of shapes: the file is damaged or forged.")


def _operands(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if target is torch.sym_sum and len(args) == 1 and isinstance(args[0], (list, tuple)) else args


def check_growth(graph: fx.Graph) -> None:
    """Check that no integer made from sizes can become so large that computing it never ends.

    Raises:
        NetworkFileError: a chain of products or powers that no model's shapes need.
    """
    bits: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in SYMBOLIC_NAME:
            continue
        operands = [value for value in _operands(node.target, node.args) if not isinstance(value, float)]
        sizes = [bits.get(value, 64) if isinstance(value, fx.Node) else int(value).bit_length() for value in operands]
        bits[node] = max(sizes, default=64) + len(sizes)
        if node.target is operator.mul:
            bits[node] = sum(sizes)
        elif node.target is operator.pow:
            bits[node] = 16 * max(sizes)
        if bits[node] > LARGEST_INTEGER_BITS:
            raise NetworkFileError(f"node {node.name!r} could be an integer of {bits[node]} bits, which is no size: the file is forged.")


def check_structure(structure: Structure, tensors: int, what: str) -> None:
    """Check that a structure is one (see ``structure.py``) and has places for that many tensors. Raises NetworkFileError."""
    if _count_tensors(structure) != tensors:
        raise NetworkFileError(f"the structure of the {what} does not fit the graph: the file is damaged.")


def _count_tensors(node: Any) -> int:
    kind = node.get("kind") if isinstance(node, dict) else None
    fields = {
        "tensor": {"kind"},
        "constant": {"kind", "value"},
        "tuple": {"kind", "items"},
        "list": {"kind", "items"},
        "dict": {"kind", "items", "keys"},
        "named": {"kind", "items", "keys"},
    }
    if not isinstance(kind, str) or set(node) != fields.get(kind):
        raise NetworkFileError(f"a structure reads {node!r}: the file is damaged.")
    if kind == "constant" and not isinstance(node["value"], (bool, int, float, str, type(None))):
        raise NetworkFileError(f"a structure holds the constant {node['value']!r}: the file is damaged.")
    if kind in ("tensor", "constant"):
        return int(kind == "tensor")
    items, keys = node["items"], node.get("keys", [])
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not isinstance(items, list) or not texts or (kind in ("dict", "named") and not len(keys) == len(set(keys)) == len(items)):
        raise NetworkFileError(f"a structure reads {node!r}: the file is damaged.")
    return sum(_count_tensors(item) for item in items)


def dry_run(module: fx.GraphModule, ports: tuple[Port, ...]) -> None:
    """Run the graph on shapes alone, at the example's sizes: proves that every operator takes what it is given (but for dtypes and values
    that only a kernel refuses: such a graph fails with torch's own error when it is run).

    Raises:
        NetworkFileError: an operator fails, or would make tensors too large or too many.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_fallback_kernels=False)
    try:
        with quiet(), mode, torch.no_grad():
            leaves = [torch.empty(port.example, dtype=port.dtype) for port in ports]
            for leaf in leaves:
                _check_size(leaf, "an input")
            results = _Shapes(module, mode).run(*leaves, enable_io_processing=False)
    except NetworkFileError:
        raise
    except Exception as error:  # every operator raises its own kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NetworkFileError(f"the graph does not run ({line}): the file is damaged or forged.") from None
    if not all(isinstance(result, Tensor) for result in results):
        raise NetworkFileError("an output is not a tensor: the file is damaged.")


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors; shape arithmetic stays arithmetic, and no value may be too large."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.extra_traceback = False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value, static_shapes=True)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem:
            if not isinstance(args[0], (list, tuple)):
                raise NetworkFileError(f"operator.getitem reads from a {type(args[0]).__name__}: the file is damaged or forged.")
        elif target in SYMBOLIC_NAME:
            if not all(isinstance(value, _NUMBERS) for value in _operands(target, args)):
                raise NetworkFileError(f"{SYMBOLIC_NAME[target]} is given something that is no number: the file is damaged or forged.")
        elif _pieces(target, args, kwargs) > MOST_TENSORS:
            raise NetworkFileError(f"{target} makes more than {MOST_TENSORS} tensors: the file is damaged or forged.")
        elif target in _GROUPED and (kwargs or not _is_grouped(target, *args)):
            raise NetworkFileError(f"{target} is given groups, scales or levels that do not fit the weight: the file is damaged or forged.")
        value = super().call_function(target, args, kwargs)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                _check_size(tensor, str(target))
        return value


def _is_grouped(target: Any, x: Any, scale: Any, third: Any, group: Any, low: Any = 0, high: Any = 255) -> bool:
    """Whether the arguments of a quantizer in groups, or to levels, fit each other: its own shape rule looks at the weight alone."""
    numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in (group, low, high))
    if not numbers or not all(isinstance(part, Tensor) for part in (x, scale, third)) or x.dim() < 2:
        return False
    columns = 1
    for size in x.shape[1:]:
        columns *= size
    if columns == 0 or group < 1 or not low < high <= (255 if low >= 0 else 127) or low < -128:
        return False
    floats = x.is_floating_point() and scale.is_floating_point()
    fits = tuple(scale.shape) == (x.shape[0], -(-columns // group))
    if target is _GROUPED[0]:
        return floats and fits and third.dtype is torch.int32 and third.shape == scale.shape
    return floats and fits and third.is_floating_point() and third.dim() == 1 and 1 <= len(third) <= 256


def _check_size(tensor: Tensor, what: str) -> None:
    size = tensor.element_size()
    for dimension in tensor.shape:
        size *= dimension if isinstance(dimension, int) else 1
    if size > LARGEST_TENSOR_BYTES:
        raise NetworkFileError(f"{what} would take {size} bytes at the example's sizes: the file is damaged or forged.")


def _pieces(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tensors an operator that splits its input would give; 0 for all others."""
    name = target._schema.name.split("::")[1]
    given = {argument.name: kwargs.get(argument.name, argument.default_value) for argument in target._schema.arguments}
    given |= dict(zip(given, args, strict=False))
    if name in ("chunk", "unsafe_chunk", "tensor_split", "hsplit", "vsplit", "dsplit"):
        pieces = given.get("chunks", given.get("sections", 0))
        return pieces if isinstance(pieces, int) else 0
    if name in ("unbind", "split", "unsafe_split") and isinstance(args[0], Tensor) and isinstance(given["dim"], int) and args[0].dim():
        size, step = args[0].shape[given["dim"]], given.get("split_size", 1)
        return size // max(1, step) if isinstance(size, int) and isinstance(step, int) else 0
    return 0
