"""From a user's module to a Network: export, clean the graph, and prove that it computes the same."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, ShapesCollection, export

from ..errors import ArtifactError, CaptureError, NetworkFileError
from ..structure import Structure, as_call, flatten
from .clean import TORCH_FOLDER, at, drop_assertions, functionalize, inline_contexts, shorten_metadata
from .network import Network, batch_of
from .operators import allowed, name_of
from .parts import Port, assign

RELATIVE_TOLERANCE = 1e-5


def capture(model: torch.nn.Module, example: Any, more: Sequence[Any] = ()) -> Network:
    """Turn a module in eval mode into a Network.

    Args:
        model: any module that ``torch.export`` can trace, on the CPU, in eval mode.
        example: inputs as a batch gives them: a tensor, a tuple of positions, or a dict of keywords. The first dimension of every
            tensor that has the batch's size is dynamic.
        more: further inputs; every dimension that differs from the example's is dynamic too (text length, image size).

    Returns: a Network that shares the model's tensors, equal to the model within 1e-5 (relative) at the sizes given and at other batch sizes.

    Raises:
        CaptureError: naming the user's source line, the operator and the way out.

    Example: ``capture(net, torch.zeros(1, 3, 32, 32)).ports`` is ``(x: float32[batch, 3, 32, 32],)``.
    """
    _check_module(model)
    calls = [_call(inputs, number) for number, inputs in enumerate([example, *more])]
    _check_repeatable(model, calls[0])
    call, dynamic = _dynamic_dimensions(calls)
    program = _export(model, call, dynamic)
    network = _network(program, call, _run(model, call), dynamic)
    _check_operators(network)
    _prove(model, network, calls)
    return network


def _check_module(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"The model is a {type(model).__name__}; expected a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("The model is a TorchScript module; expected the Python module it was made from.")
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise CaptureError(f"The model is in training mode (at {training[0]}); call model.eval() before.")
    devices = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
    if devices - {"cpu"}:
        raise CaptureError(f"The model lies on {', '.join(sorted(devices))}; expected cpu: call model.cpu() before.")


def _call(inputs: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = as_call(inputs)
    try:
        leaves, _ = flatten([args, kwargs])
    except ArtifactError as error:
        raise CaptureError(f"Example {number}: {error}") from None
    if not leaves:
        raise CaptureError(f"Example {number} holds no tensor; expected the inputs of one batch.")

    def tensors(value: Any) -> Any:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            # A clone, so that a tensor given twice is two inputs.
            return torch.as_tensor(value).detach().clone()
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(tensors(item) for item in value)
        return value

    return tensors(args), tensors(kwargs)


def _run(model: torch.nn.Module, call: tuple[Any, dict[str, Any]]) -> Any:
    try:
        with torch.no_grad():
            return model(*call[0], **call[1])
    except Exception as error:
        raise CaptureError(
            f"The model itself fails on the example: {type(error).__name__}: {error}\n{_where(error)}Give an example that it takes."
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


def _outputs(model: torch.nn.Module, call: Any) -> list[Tensor]:
    try:
        return _describe(_run(model, call))[0]
    except ArtifactError as error:
        raise CaptureError(f"The output cannot be described: {error}") from None


def _check_repeatable(model: torch.nn.Module, call: Any) -> None:
    one, two = _outputs(model, call), _outputs(model, call)
    if not one:
        raise CaptureError("The model returns no tensor.")
    if any(not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(one, two, strict=True)):
        raise CaptureError("The model gives two different outputs for one input, in eval mode: remove its randomness (or state) before.")


def _dynamic_dimensions(calls: list[Any]) -> tuple[Any, dict[int, set[int]]]:
    """The call to export with, and per tensor leaf the dimensions to leave open."""
    shapes = [[tuple(leaf.shape) for leaf in _leaves([*call])] for call in calls]
    if any([len(s) for s in shape] != [len(s) for s in shapes[0]] for shape in shapes):
        raise CaptureError(f"The examples differ in the number of tensors or of their dimensions: {shapes[0]} and {shapes[-1]}.")
    size = next((s[0] for s in shapes[0] if s), None)
    dynamic: dict[int, set[int]] = {}
    for leaf, columns in enumerate(zip(*shapes, strict=True)):
        dims = {d for d in range(len(columns[0])) if len({shape[d] for shape in columns}) > 1}
        dynamic[leaf] = dims | ({0} if columns[0] and columns[0][0] == size else set())
    # Export takes a size of 1 as a constant: use the example with the largest sizes, and double a batch of one.
    best = max(range(len(calls)), key=lambda i: min((s[d] for leaf, s in enumerate(shapes[i]) for d in dynamic[leaf]), default=0))
    args, kwargs = calls[best]
    if shapes[best] and next((s[0] for s in shapes[best] if s), 0) == 1:
        args, kwargs = batch_of((args, kwargs), [0, 0])
    return (args, kwargs), dynamic


def _export(model: torch.nn.Module, call: Any, dynamic: dict[int, set[int]]) -> ExportedProgram:
    args, kwargs = call
    open_shapes = ShapesCollection()
    for leaf, tensor in enumerate(_leaves([args, kwargs])):
        open_shapes[tensor] = {d: Dim.AUTO for d in dynamic[leaf]}  # type: ignore[assignment]
    # Outputs leave flat: export does not know every container (caches, dataclasses); the structure is kept beside the graph.
    flat = model.register_forward_hook(lambda module, inputs, outputs: tuple(_describe(outputs)[0]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = open_shapes.dynamic_shapes(model, args, kwargs)
            return export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(_explain(error)) from error
    finally:
        flat.remove()


def _explain(error: BaseException) -> str:
    """What failed, where in the user's code, and what to do about it."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    kind = type(error).__name__
    if "DataDependent" in kind or "data-dependent" in text or "_local_scalar_dense" in text:
        mend = "The code branches on, or makes a shape from, the VALUES of a tensor (.item(), if tensor:, nonzero): use torch.where or a fixed size."
    elif "Missing" in kind or "no fake" in text or "fake impl" in text:
        mend = "The operator has no shape rule: register one with torch.library.register_fake, or write the layer in plain torch."
    else:
        mend = "Write that line in operators that torch.export traces; torch.export.export(model, example, strict=False) shows the same failure."
    return f"The model cannot be captured: {kind}: {first}\n{_where(error)}{mend}"


def _where(error: BaseException) -> str:
    """The deepest line of code outside torch in an error's traceback, as a line of text; empty if there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((TORCH_FOLDER, "<")) and Path(frame.filename).parent != Path(__file__).parent
    ]
    return f"  at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}\n" if frames else ""


def _network(program: ExportedProgram, call: Any, outputs: Any, dynamic: dict[int, set[int]]) -> Network:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.module(check_guards=False)
    graph = module.graph
    inline_contexts(module)
    drop_assertions(graph)
    _, structure = _describe(outputs)
    node = next(node for node in graph.nodes if node.op == "output")
    results = list(node.args[0])  # type: ignore[arg-type]
    if not all(isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor) for result in results):
        raise CaptureError("An output is a constant, or a number made from shapes: return only tensors that depend on the inputs.")
    examples, inputs = flatten([call[0], call[1]])
    placeholders = _tensor_placeholders(graph, call, len(examples))
    node.args = (tuple(results),)
    shorten_metadata(graph)
    graph.eliminate_dead_code()
    functionalize(graph)
    made = fx.GraphModule(_root(module, graph), _plain(graph))
    network = Network(made, inputs, structure, _ports(placeholders, examples, dynamic))
    network.recompile()
    _check_dynamic(network, dynamic)
    return network


def _root(module: fx.GraphModule, graph: fx.Graph) -> torch.nn.Module:
    """A plain tree of modules with the tensors that the graph reads, under the user's names."""
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, leaf = node.target.rpartition(".")
        value = getattr(module.get_submodule(path), leaf)
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"The graph holds {node.target}, a {type(value).__name__}: control flow such as torch.cond cannot be captured.\n{at(node)}"
            )
        assign(root, node.target, value)
    return root


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph without export's calling convention: tensors in, a flat tuple of tensors out."""
    plain = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = plain.graph_copy(graph, mapping)
    plain.output(output)
    for old, new in mapping.items():
        new.meta = old.meta
    return plain


def _tensor_placeholders(graph: fx.Graph, call: Any, count: int) -> list[fx.Node]:
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


def _ports(placeholders: list[fx.Node], examples: list[Tensor], dynamic: dict[int, set[int]]) -> tuple[Port, ...]:
    symbols: dict[str, str] = {}
    ports = []
    for node, tensor in zip(placeholders, examples, strict=True):
        dims: list[int | str] = []
        for d, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                dims.append(size)
            else:
                dims.append("batch" if d == 0 else symbols.setdefault(str(size), f"size{len(symbols) + 1}"))
        ports.append(Port(node.name, tensor.dtype, tuple(dims), tuple(tensor.shape)))
        node.meta = {"module": "", "source": ""}
    return tuple(ports)


def _check_dynamic(network: Network, dynamic: dict[int, set[int]]) -> None:
    """A dimension that differs between the user's examples must have stayed open."""
    for leaf, port in enumerate(network.ports):
        fixed = [d for d in dynamic[leaf] if d and isinstance(port.dims[d], int)]
        if fixed:
            raise CaptureError(
                f"Input {port.name}: dimension {fixed[0]} differs between your examples, but the model's code fixes it at {port.dims[fixed[0]]}. "
                "Give inputs of one size, or take the size from x.shape in the code."
            )


def _check_operators(network: Network) -> None:
    for node in network.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method") and not (node.op == "call_function" and allowed(node.target)):
            raise CaptureError(
                f"The model uses {node.target}, which downsize does not handle.\n{at(node)}"
                "Write that part with ordinary torch operators, or without custom operators and control flow."
            )
        if node.op == "call_function":
            try:
                name_of(node.target)
            except NetworkFileError as error:
                raise CaptureError(f"{error}\n{at(node)}") from None


def _prove(model: torch.nn.Module, network: Network, calls: list[Any]) -> None:
    """The law captured == original, at every example and at other batch sizes."""
    batched = any("batch" in port.dims for port in network.ports)
    trials = list(calls)
    if batched:
        trials += [batch_of(calls[0], [0]), batch_of(calls[0], [0] * 3)]
    for call in trials:
        expected = _outputs(model, call)
        with torch.no_grad():
            try:
                got = network.graph_module(*network.leaves(call))
            except Exception as error:
                sizes = [list(leaf.shape) for leaf in _leaves([*call])]
                raise CaptureError(f"The captured graph fails at sizes {sizes}, which the model takes: {error}\nGive all inputs one size.") from error
        _compare(expected, got)


def _compare(expected: list[Tensor], got: Sequence[Tensor]) -> None:
    for number, (one, two) in enumerate(zip(expected, got, strict=True)):
        if one.shape != two.shape or one.dtype != two.dtype:
            raise CaptureError(
                f"Output {number} of the captured graph is {two.dtype}{list(two.shape)}; the model gives {one.dtype}{list(one.shape)}."
            )
        if not one.is_floating_point():
            if not torch.equal(one, two):
                raise CaptureError(f"Output {number} of the captured graph differs from the model's: it depends on something other than its inputs.")
            continue
        finite = torch.isfinite(one)
        scale = float(one[finite].abs().max()) if finite.any() else 0.0
        gap = float((one - two)[finite].abs().max()) if finite.any() else 0.0
        if gap > RELATIVE_TOLERANCE * max(scale, 1e-30) and gap > 1e-30:
            raise CaptureError(
                f"Output {number} of the captured graph differs from the model's by {gap:.3g} (largest value {scale:.3g}): the forward takes "
                "another path for other inputs or sizes. Remove Python conditions on values or sizes from it."
            )
