"""A Network as an ONNX file: standard operators, real integer weights, and the structure of inputs and outputs in its metadata."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

import ast
import collections
import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset20 as op
from torch.export import Dim, export

from ..errors import ExportError
from . import lower_recurrent, packed_onnx
from .attention import spell_attention
from .lower import lower
from .lower_groups import Decoding
from .lower_halves import lower_halves
from .network import Network
from .rewrite import aten, drop_identities, fold_batch_norm, fold_padding, reshape_views
from .runtime_faults import avoid
from .translations import read_once, retraced_where_needed, traced_briefly

METADATA_KEY = "downsize.io"
# protobuf cannot hold more in one file.
LARGEST_FILE = 2**31 - 2**20
ours = torch.ops.downsize


def _quantize(x, scale, zero_point):
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize(q, scale, zero_point, axis=None):
    return op.DequantizeLinear(q, scale, zero_point) if axis is None else op.DequantizeLinear(q, scale, zero_point, axis=axis)


def _quantized_embedding(q, scale, index, axis):
    rows = op.Gather(q, index, axis=axis)
    if axis == 1:
        rank = len(index.shape)
        rows = op.Transpose(rows, perm=[*range(1, rank + 1), 0])
    return op.Mul(op.Cast(rows, to=1), op.Gather(scale, index))


def _dynamic_linear(x, q, scale):
    codes, x_scale, x_zero = op.DynamicQuantizeLinear(x)
    return op.Mul(op.Cast(op.MatMulInteger(codes, q, x_zero), to=1), op.Mul(x_scale, scale))


def _fake_quantize_dynamic(x):
    codes, scale, zero = op.DynamicQuantizeLinear(x)
    return op.DequantizeLinear(codes, scale, zero)


def _global_average(x, output_size):
    return op.GlobalAveragePool(x)


def _adaptive_average(x, output_size):
    """The mean over [floor(i n / m), ceil((i + 1) n / m)) along each of the last dimensions: one product with a constant matrix for each."""
    if all(size == 1 for size in output_size):
        return op.ReduceMean(x, op.Constant(value_ints=list(range(-len(output_size), 0))))
    rank = len(x.shape)
    first = rank - len(output_size)
    shape, last_first = list(x.shape), [*range(first), rank - 1, *range(first, rank - 1)]
    for before, after in zip(reversed(shape[first:]), reversed(output_size), strict=True):
        if not isinstance(before, int) or not isinstance(after, int):
            raise ExportError("adaptive average pooling to more than one position needs fixed sizes; here they are open")
        x = op.Transpose(op.MatMul(x, op.Constant(value=ir.tensor(_means(before, after)))), perm=last_first)
    return x


def _means(before: int, after: int) -> torch.Tensor:
    """Matrix [before, after] whose columns take the means of adaptive pooling."""
    index = torch.arange(before)[:, None]
    start, end = torch.arange(after) * before // after, -(-(torch.arange(after) + 1) * before // after)
    inside = ((index >= start) & (index < end)).float()
    return inside / inside.sum(0)


TRANSLATIONS = {
    ours.quantize.default: _quantize,
    ours.dequantize.default: _dequantize,
    ours.quantized_embedding.default: _quantized_embedding,
    ours.dynamic_linear.default: _dynamic_linear,
    ours.fake_quantize_dynamic.default: _fake_quantize_dynamic,
    **packed_onnx.TRANSLATIONS,
    **lower_recurrent.TRANSLATIONS,
    # The exporter cannot say it.
    aten.adaptive_avg_pool3d.default: _adaptive_average,
}


def write(network: Network, path: str | Path, runtime: str = "") -> None:
    """Write ``network`` to ``path`` as one ONNX file (opset 20), whole or not at all; batch and other open dimensions stay open.

    Args: ``runtime``: the name of a runtime whose own operators may be used beside the standard ones.

    Raises:
        ExportError: naming the operator that ONNX cannot say and the user's source line; or the disk is full, or the folder missing.
    """
    model = to_onnx(network, runtime)
    path = Path(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        ir.save(model, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ExportError(f"{path} cannot be written: {error.strerror or error}. Give a folder that exists and has room.") from error
        raise


def decodings(network: Network, runtime: str = "") -> list[Decoding]:
    """Of each quantized weight that the file for ``runtime`` holds in another form than is computed with: where it is decoded."""
    return _lowered(network, runtime)[1]


def _lowered(network: Network, runtime: str) -> tuple[Network, list[Decoding], str]:
    """The network as it is written, where weights are decoded, and the precision in which it is to be computed ("": float32)."""
    lowered = network.fork().eval()
    drop_identities(lowered)
    reshape_views(lowered)
    fold_batch_norm(lowered)
    fold_padding(lowered)
    precision = lower_halves(lowered)
    made = lower(lowered, runtime)
    avoid(lowered)
    spell_attention(lowered)
    return lowered, made, precision


def to_onnx(network: Network, runtime: str = "") -> ir.Model:
    """The ONNX form of ``network``, in memory, sharing its tensors."""
    lowered, _, precision = _lowered(network, runtime)
    size = sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for _, t in lowered.named_tensors()}.values())
    if size > LARGEST_FILE:
        raise ExportError(f"The file would hold {size / 1e9:.1f} GB; one ONNX file holds at most 2 GB. Compress the network more, or split it.")
    names = [port.name for port in network.ports], _output_names(lowered)
    made = _translate(lowered, names)
    packed_onnx.spell_packed(made)
    _finish(made, network, names, precision)
    return made


def _translate(network: Network, names: tuple[list[str], list[str]]) -> ir.Model:
    with _quiet(), read_once(), traced_briefly(), retraced_where_needed():
        program = _export(network)
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=names[0],
                output_names=names[1],
                custom_translation_table=_translations(network),
                verbose=False,
            )
        except Exception as error:
            raise ExportError(_explain(error, network)) from error
    assert made is not None
    return made.model


def _output_names(network: Network) -> list[str]:
    """``output``, or ``output0``, ``output1``, ...; with underscores behind if something in the file has such a name."""
    outputs = next(node for node in network.graph.nodes if node.op == "output").args[0]
    taken = {name for node in network.graph.nodes if node.op != "output" for name in (node.name, str(node.target))}
    names = ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    while taken & set(names):
        names = [f"{name}_" for name in names]
    return names


def _translations(network: Network) -> dict[Any, Any]:
    """Our operators, and global average pooling as one operator (integer kernels exist for it, not for ReduceMean)."""
    pools = [node for node in network.graph.nodes if node.target is aten.adaptive_avg_pool2d.default]
    every_global = all(list(node.args[1]) == [1, 1] for node in pools)
    return {**TRANSLATIONS, **({aten.adaptive_avg_pool2d.default: _global_average} if pools and every_global else {})}


def _export(network: Network) -> torch.export.ExportedProgram:
    for node in network.graph.nodes:
        # The exporter hands this on to the nodes it makes; it is how their names come to tell the user's modules.
        node.meta["nn_module_stack"] = {"": ("", "Module"), "module": (node.meta.get("module", ""), "Module")}
    examples = []
    for port in network.ports:
        # Export takes a size of 1 as a constant.
        sizes = [max(size, 2) if isinstance(dim, str) else size for dim, size in zip(port.dims, port.example, strict=True)]
        examples.append(torch.zeros(sizes, dtype=port.dtype))
    shapes = tuple({d: Dim.AUTO for d, dim in enumerate(port.dims) if isinstance(dim, str)} for port in network.ports)
    try:
        with torch.no_grad():
            return export(network.graph_module, tuple(examples), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(_explain(error, network)) from error


def _explain(error: BaseException, network: Network) -> str:
    causes: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in causes:
        causes.append(seen)
        seen = seen.__cause__
    text = " ".join(str(cause) for cause in causes)
    named = [node for node in network.graph.nodes if node.op == "call_function" and f"%{node.name} " in text]
    where = f" at {named[-1].target} in {named[-1].meta.get('module') or 'the model'}\n  {named[-1].meta.get('source', '')}" if named else ""
    last = str(causes[-1]).strip().splitlines()
    return (
        f"The network cannot be written as ONNX{where}\n{type(causes[-1]).__name__}: {last[0] if last else ''}\nWrite that part with other operators."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own prints, log lines and warnings off the user's screen; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _finish(model: ir.Model, network: Network, names: tuple[list[str], list[str]], precision: str) -> None:
    """Name the open dimensions, drop what only costs bytes, and write the structure of inputs and outputs into the metadata.

    A node is named ``<the user's module path>:<operator>_<number>``, so that a profile of the file can be told by modules.
    """
    for value, port in zip(model.graph.inputs, network.ports, strict=True):
        value.shape = ir.Shape(list(port.dims))
    count: collections.Counter[str] = collections.Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        count[node.op_type] += 1
        node.name = f"{scopes[-2] if len(scopes) > 2 else ''}:{node.op_type}_{count[node.op_type]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape, value.type = None, None
    for value in [*model.graph.initializers.values(), *model.graph.inputs]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props[METADATA_KEY] = json.dumps(
        {
            "version": 1,
            "inputs": network.inputs,
            "outputs": network.outputs,
            "input_names": names[0],
            "output_names": names[1],
            "input_shapes": [list(port.dims) for port in network.ports],
            "input_dtypes": [str(port.dtype).removeprefix("torch.") for port in network.ports],
            **({"precision": precision} if precision else {}),
        }
    )
    model.producer_name, model.producer_version, model.doc_string = "downsize", None, None
