"""From a user's module to a Network: export, clean the graph, and prove that it computes the same."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.utils._pytree import tree_map

from ..errors import ArtifactError, CaptureError, NetworkFileError
from ..structure import Structure, as_call, flatten
from .causal import masks_by_value
from .clean import NOT_THE_USERS, at, drop_assertions, drop_state, functionalize, inline_contexts, shorten_metadata, spell_padding
from .memory import drop_dead
from .network import Network
from .operators import allowed
from .parts import Port, assign, legal_name
from .proof import check_equal
from .quiet import quiet
from .repeats import merge_repeats

BATCH = "batch"
WRAPPED = "downsize_model"


def capture(model: torch.nn.Module, example: Any, more: Sequence[Any] = ()) -> Network:
    """Turn a module in eval mode into a Network.

    Args:
        model: any module that ``torch.export`` can trace, on the CPU, in eval mode.
        example: inputs as a batch gives them: a tensor, a tuple of positions, or a dict of keywords. The first dimension of every
            tensor that has the batch's size (that of the first tensor) is dynamic.
        more: further inputs; every dimension that differs from the example's is dynamic too (text length, image size).

    Returns: a Network that shares the model's tensors, equal to the model within 1e-5 (relative) at the sizes given and at other batch sizes.

    Raises:
        CaptureError: naming the user's source line, the operator and the way out.

    Example: ``capture(net, torch.zeros(1, 3, 32, 32)).ports`` is ``(x: float32[batch, 3, 32, 32],)``.
    """
    _check_module(model)
    calls = [_call(inputs, number) for number, inputs in enumerate([example, *more])]
    expected = [_outputs(model, call, number) for number, call in enumerate(calls)]
    _check_repeatable(expected[0][0], _outputs(model, calls[0], 0)[0])
    call, dynamic = _largest(model, calls, _dynamic_dimensions(calls))
    network = _network(_export(model, call, dynamic), call, expected[0][1], dynamic)
    _prove(network, [*zip(calls, expected, strict=True), *_other_batches(model, network, calls[0], dynamic)])
    try:
        network.check()
    except NetworkFileError as error:
        raise CaptureError(f"The captured graph could not be saved: {error}\nWrite that part with ordinary torch operators on tensors.") from error
    return network


def _check_module(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"The model is a {type(model).__name__}; expected a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("The model is a TorchScript module; expected the Python module it was made from.")
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise CaptureError(f"The model is in training mode (at {training[0]}); call model.eval() before.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise CaptureError(f"The model's {name} lies on {tensor.device.type}; expected cpu: call model.cpu() before.")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CaptureError(
                f"The model's {name} is {tensor.layout} {tensor.dtype}; expected a dense float or integer tensor: call its to_dense()."
            )


def _call(inputs: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = as_call(inputs)
    try:
        leaves, _ = flatten([*call])
        if not leaves:
            raise CaptureError(f"Example {number} holds no tensor; expected the inputs of one batch.")
        return _copied(call)
    except (ArtifactError, TypeError) as error:
        raise CaptureError(f"Example {number}: {error}") from None


def _copied(value: Any) -> Any:
    """The same with new tensors, so that a tensor given twice is two inputs, and a forward that writes into its inputs spoils none."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return torch.as_tensor(value).detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    return type(value)(map(_copied, value)) if isinstance(value, (tuple, list)) else value


def _run(model: torch.nn.Module, call: tuple[Any, dict[str, Any]], number: int) -> Any:
    args, kwargs = _copied(call)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"The model itself fails on example {number}: {type(error).__name__}: {error}\n{_where(error)}Give an example that it takes."
        ) from error


def _leaves(tree: Any) -> list[Tensor]:
    return flatten(tree)[0]


def _describe(outputs: Any) -> tuple[list[Tensor], Structure]:
    """The output tensors and their structure.

    Entries of a dict-like output that are neither tensors nor containers of them (the key-value cache of a language model) are left out:
    a model file has no place for them.
    """
    if not isinstance(outputs, Mapping):
        return flatten(outputs)
    kept = {}
    for key, value in outputs.items():
        try:
            flatten(value)
            kept[key] = value
        except ArtifactError:
            if isinstance(value, (tuple, list, dict)):
                raise
    return flatten(kept)


def _outputs(model: torch.nn.Module, call: Any, number: int) -> tuple[list[Tensor], Structure]:
    try:
        tensors, structure = _describe(_run(model, call, number))
    except ArtifactError as error:
        raise CaptureError(f"The output cannot be described: {error}") from None
    if not tensors:
        raise CaptureError("The model returns no tensor.")
    return tensors, structure


def _check_repeatable(one: list[Tensor], two: list[Tensor]) -> None:
    if any(a.shape != b.shape or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(one, two, strict=True)):
        raise CaptureError("The model gives two different outputs for one input, in eval mode: remove its randomness (or state) before.")


def _dynamic_dimensions(calls: list[Any]) -> dict[int, dict[int, str]]:
    """Per tensor leaf the dimensions to leave open, and their names as far as they have one: ``batch``, else empty."""
    shapes = [[tuple(leaf.shape) for leaf in _leaves([*call])] for call in calls]
    if any([len(s) for s in shape] != [len(s) for s in shapes[0]] for shape in shapes):
        raise CaptureError(f"The examples differ in the number of tensors or of their dimensions: {shapes[0]} and {shapes[-1]}.")
    batch = [next((s[0] for s in shape if s), None) for shape in shapes]
    dynamic: dict[int, dict[int, str]] = {}
    for leaf, columns in enumerate(zip(*shapes, strict=True)):
        dynamic[leaf] = {d: "" for d in range(len(columns[0])) if len({shape[d] for shape in columns}) > 1}
        if columns[0] and [shape[0] for shape in columns] == batch:
            dynamic[leaf] = {0: BATCH, **{d: name for d, name in dynamic[leaf].items() if d}}
    return dynamic


def _batched(dynamic: dict[int, dict[int, str]]) -> set[int]:
    return {leaf for leaf, dims in dynamic.items() if dims.get(0) == BATCH}


def _largest(model: torch.nn.Module, calls: list[Any], dynamic: dict[int, dict[int, str]]) -> tuple[Any, dict[int, dict[int, str]]]:
    """The call to export with, and what it can leave open: export takes a size of 1 as a constant, so a batch of one is doubled."""

    def smallest_open(call: Any) -> int:
        return min((leaf.shape[d] for i, leaf in enumerate(_leaves([*call])) for d, name in dynamic[i].items() if name != BATCH), default=0)

    best = max(calls, key=smallest_open)
    batched = _batched(dynamic)
    if [leaf.shape[0] for i, leaf in enumerate(_leaves([*best])) if i in batched][:1] != [1]:
        return best, dynamic
    doubled = _rows(best, batched, [0, 0])
    try:
        _run(model, doubled, 0)
        return doubled, dynamic
    except CaptureError:
        # A model for single samples.
        return best, {leaf: {d: name for d, name in dims.items() if name != BATCH} for leaf, dims in dynamic.items()}


def _rows(call: Any, batched: Collection[int], rows: list[int]) -> Any:
    numbers = itertools.count()
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and next(numbers) in batched else leaf, call)


class _Flat(torch.nn.Module):
    """The model with outputs in one flat tuple (export does not know every container), a name for every input of a ``forward(**inputs)``
    (export cannot open dimensions of nameless ones), and one level deeper, so that no name of the user's meets one of torch's."""

    def __init__(self, model: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.add_module(WRAPPED, model)
        self.training = False

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            return tuple(_describe(model(*args, **kwargs))[0])

        parameters = inspect.signature(model.forward).parameters
        named = [parameter for parameter in parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        if len(named) < len(parameters):
            known = {parameter.name for parameter in named}
            named += [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in kwargs if key not in known]
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        self.forward = forward


def _export(model: torch.nn.Module, call: Any, dynamic: dict[int, dict[int, str]]) -> ExportedProgram:
    args, kwargs = _copied(call)
    open_shapes = ShapesCollection()
    for leaf, tensor in enumerate(_leaves([args, kwargs])):
        open_shapes[tensor] = {d: Dim.AUTO for d in dynamic[leaf]}  # type: ignore[assignment]
    flat = _Flat(model, kwargs)
    try:
        with quiet(), masks_by_value():
            return export(flat, args, kwargs, dynamic_shapes=open_shapes.dynamic_shapes(flat, args, kwargs), strict=False)
    except Exception as error:
        raise CaptureError(_explain(error)) from error


_VALUES = "The code branches on, or makes a shape from, the VALUES of a tensor (.item(), if tensor:, nonzero): use torch.where or a fixed size."


def _explain(error: BaseException) -> str:
    """What failed, where in the user's code, and what to do about it."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    kind = type(error).__name__
    if isinstance(error, ArtifactError) and "Sym" in text:
        return "An output is a number that is made from shapes; expected tensors only: return the tensors, and read their shape outside."
    if "DataDependent" in kind or "data-dependent" in text or "_local_scalar_dense" in text:
        mend = _VALUES
    elif "Missing" in kind or "no fake" in text or "fake impl" in text:
        mend = "The operator has no shape rule: register one with torch.library.register_fake, or write the layer in plain torch."
    elif "is invalid for input of size" in text:
        mend = "It has a number where another size can come: take sizes from x.shape."
    else:
        mend = "Write that line in operators that torch.export traces; torch.export.export(model, example, strict=False) shows the same failure."
    return f"The model cannot be captured: {kind}: {first}\n{_where(error)}{mend}"


def _where(error: BaseException) -> str:
    """The deepest line of code outside torch in an error's traceback, as a line of text; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(NOT_THE_USERS)]
    return f"  at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}\n" if frames else ""


def _network(program: ExportedProgram, call: Any, outputs: Structure, dynamic: dict[int, dict[int, str]]) -> Network:
    with quiet():
        module = program.module(check_guards=False)
    graph = module.graph
    inline_contexts(module)  # type: ignore[arg-type]
    drop_assertions(graph)
    node = next(node for node in graph.nodes if node.op == "output")
    results = list(node.args[0])  # type: ignore[arg-type]
    if not all(isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor) for result in results):
        raise CaptureError("An output is a constant, or a number made from shapes: return only tensors that depend on the inputs.")
    examples, inputs = flatten([*call])
    placeholders = _tensor_placeholders(graph, len(examples))
    node.args = (tuple(results),)
    _check_operators(graph)
    spell_padding(graph)
    drop_dead(graph)
    functionalize(graph)
    drop_state(graph)
    merge_repeats(graph)
    ports = _ports(placeholders, examples, dynamic)
    shorten_metadata(graph, WRAPPED)
    made = fx.GraphModule(_root(module, graph), _plain(graph))
    network = Network(made, inputs, outputs, ports)
    network.recompile()
    _check_dynamic(network, dynamic)
    return network


def _root(module: torch.nn.Module, graph: fx.Graph) -> torch.nn.Module:
    """A plain tree of modules with the tensors that the graph reads, under the user's names, which the nodes then have too."""
    root = torch.nn.Module()
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, leaf = node.target.rpartition(".")
        value = getattr(module.get_submodule(path), leaf)
        own = node.target.removeprefix(f"{WRAPPED}.")
        node.target = names.setdefault(node.target, legal_name(own, names.values()))
        assign(root, node.target, value)
    return root


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph without export's calling convention: tensors in, a flat tuple of tensors out; inputs and tensors are called by their names."""
    plain = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
        target = node.name if node.op == "placeholder" else node.target
        name = re.sub(r"\W", "_", node.target) if node.op == "get_attr" else node.name
        made[node] = plain.create_node(node.op, target, args, kwargs, name=name)
        made[node].meta = node.meta
    return plain


def _tensor_placeholders(graph: fx.Graph, count: int) -> list[fx.Node]:
    """The placeholders of tensors; those of constants (None, numbers, text) were specialised away and are removed."""
    kept = []
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if isinstance(node.meta.get("val"), Tensor):
            kept.append(node)
        elif not node.users:
            graph.erase_node(node)
        else:
            raise CaptureError(f"Input {node.name} is a number that the graph computes with; give it as a tensor.")
    if len(kept) != count:
        raise CaptureError(f"The graph takes {len(kept)} tensors, the example holds {count}.")
    return kept


def _ports(placeholders: list[fx.Node], examples: list[Tensor], dynamic: dict[int, dict[int, str]]) -> tuple[Port, ...]:
    symbols: dict[str, str] = {}
    ports = []
    for leaf, (node, tensor) in enumerate(zip(placeholders, examples, strict=True)):
        dims: list[int | str] = []
        for d, size in enumerate(node.meta["val"].shape):
            number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
            if number is not None:
                dims.append(number)
            else:
                dims.append(dynamic[leaf][d] or symbols.setdefault(str(size), f"size{len(symbols) + 1}"))
        ports.append(Port(node.name, tensor.dtype, tuple(dims), tuple(tensor.shape)))
    return tuple(ports)


def _check_dynamic(network: Network, dynamic: dict[int, dict[int, str]]) -> None:
    """A dimension that differs between the user's examples must have stayed open."""
    for leaf, port in enumerate(network.ports):
        fixed = [d for d, name in dynamic[leaf].items() if name != BATCH and isinstance(port.dims[d], int)]
        if fixed:
            raise CaptureError(
                f"Input {port.name}: dimension {fixed[0]} differs between your examples, but the model's code fixes it at {port.dims[fixed[0]]}. "
                "Give inputs of one size, or take the size from x.shape in the code."
            )


def _check_operators(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or (node.op == "call_function" and allowed(node.target)):
            continue
        mend = "Write that part with ordinary torch operators."
        if str(node.target).startswith("aten.item"):
            mend = _VALUES
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            mend = "Control flow on values has no place in a Network: compute both sides and choose with torch.where."
        raise CaptureError(f"The model uses {node.target}, which downsize does not handle.\n{at(node)}{mend}")


def _other_batches(model: torch.nn.Module, network: Network, call: Any, dynamic: dict[int, dict[int, str]]) -> Iterator[Any]:
    """The call with one and with three samples and what the model gives for them; nothing for sizes that the model itself does not take."""
    batched = {leaf for leaf, port in enumerate(network.ports) if BATCH in port.dims} & _batched(dynamic)
    for rows in ([0], [0] * 3) if batched else ():
        other = _rows(call, batched, rows)
        with contextlib.suppress(CaptureError):
            yield other, _outputs(model, other, 0)


def _prove(network: Network, trials: list[Any]) -> None:
    """The law captured == original."""
    for call, (expected, structure) in trials:
        with torch.no_grad():
            try:
                got = network.graph_module(*network.leaves(_copied(call)))
            except Exception as error:
                sizes = [list(leaf.shape) for leaf in _leaves([*call])]
                raise CaptureError(f"The captured graph fails at sizes {sizes}, which the model takes: {error}\nTake sizes from x.shape.") from error
        if structure != network.outputs:
            raise CaptureError("An output that is no tensor differs between inputs (a number made from shapes?): return only tensors.")
        check_equal(expected, got)
