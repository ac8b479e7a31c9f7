"""The methods that are compared: each makes one ONNX file from the same torch model and the same calibration data.

The methods of ONNX Runtime and nncf work on ONNX files: exporting the float model first is part of their making.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Start


@dataclass(frozen=True)
class Method:
    """``make(start, file, folder)`` writes ``file``, may use the empty ``folder`` for what lies between, and returns a note or None.

    ``imports``: the libraries that are in memory before.
    """

    name: str
    make: Callable[[Start, Path, Path], str | None]
    imports: tuple[str, ...]
    transformers_only: bool = False


# downsize ---------------------------------------------------------------------------------------------------------------------------


def downsize_float(start: Start, file: Path, folder: Path) -> None:
    _downsize(start, file, quantized=False)


def downsize_int8(start: Start, file: Path, folder: Path) -> None:
    _downsize(start, file, quantized=True)


def _downsize(start: Start, file: Path, quantized: bool) -> None:
    from downsize.network.capture import capture
    from downsize.network.onnx_file import write
    from downsize.task import Task
    from downsize.techniques.quantize import Quantize

    assert start.model is not None
    task = Task(start.model, start.example, {"calibrate": start.calibrate})
    network = capture(task.model, task.example, more=task.variations())
    write(Quantize()(network, task) if quantized else network, file)


# The float model as ONNX, which all peers start from --------------------------------------------------------------------------------


def export(start: Start, file: Path, folder: Path) -> None:
    """torch's own exporter. The model is let go after it, as one who goes on in another program does."""
    names = list(start.dimensions)
    example = start.example
    # Two samples: torch.export takes a dimension of 1 for one that is always 1.
    pair = {name: torch.cat([tensor, tensor]) for name, tensor in example.items()} if isinstance(example, dict) else torch.cat([example, example])
    args, kwargs = ((), pair) if isinstance(pair, dict) else ((pair,), {})
    shapes: Any = start.dimensions if isinstance(pair, dict) else tuple(start.dimensions.values())
    assert start.model is not None
    torch.onnx.export(
        start.model,
        args,
        str(file),
        kwargs=kwargs,
        input_names=names,
        output_names=["output"],
        dynamic_shapes=shapes,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    start.model = None


class Samples:
    """The calibration data one sample at a time, as arrays by input name; iterable many times.

    nncf asks for single samples; for ONNX Runtime they give the same ranges as batches, and need less memory.
    """

    def __init__(self, start: Start) -> None:
        self.start = start

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        names = list(self.start.dimensions)
        for inputs, _ in self.start.calibrate():
            given: dict[str, Any] = inputs if isinstance(inputs, dict) else dict.fromkeys(names, inputs)
            arrays = {name: given[name].numpy() for name in names}
            for row in range(len(arrays[names[0]])):
                yield {name: array[row : row + 1] for name, array in arrays.items()}


# onnxruntime.quantization -----------------------------------------------------------------------------------------------------------


def _prepared(start: Start, folder: Path) -> tuple[Path, str | None]:
    """The exported model after the recommended pre-processing (shape inference and graph optimization), and a note if a part had to go."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared = folder / "float.onnx", folder / "prepared.onnx"
    export(start, plain, folder)
    try:
        quant_pre_process(plain, prepared)
    except Exception as error:  # a bare Exception is what it raises when it cannot follow a shape
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        return prepared, f"pre-processed with skip_symbolic_shape=True, because without it: {type(error).__name__}: {error}"
    return prepared, None


def onnxruntime_static(start: Start, file: Path, folder: Path) -> str | None:
    """QDQ, min-max, uint8 activations, int8 weights by channel: what its documentation recommends for x86 with VNNI and accuracy."""
    prepared, note = _prepared(start, folder)
    _static(start, prepared, file)
    return note


def onnxruntime_placed(start: Start, file: Path, folder: Path) -> str | None:
    """The same, told by hand what suits transformers: only the embeddings, and the inputs of products with a constant matrix."""
    import onnx

    prepared, note = _prepared(start, folder)
    graph = onnx.load(prepared).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in constants]
    gathers = [node.name for node in graph.node if node.op_type == "Gather" and node.input[0] not in constants]
    extra = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
    _static(start, prepared, file, op_types_to_quantize=["MatMul", "Gather"], nodes_to_exclude=[*products, *gathers], extra_options=extra)
    return note


def _static(start: Start, model: Path, file: Path, **more: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(Samples(start))

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return next(self.samples, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(model, file, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types, **more)


def onnxruntime_dynamic(start: Start, file: Path, folder: Path) -> str | None:
    """Ranges of activations at run time: what its documentation recommends for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared, note = _prepared(start, folder)
    quantize_dynamic(prepared, file, per_channel=True, weight_type=QuantType.QInt8)
    return note


# nncf -------------------------------------------------------------------------------------------------------------------------------


def nncf_int8(start: Start, file: Path, folder: Path) -> None:
    """nncf's defaults on the ONNX model, told the type of the model when it is a transformer."""
    import nncf  # pyright: ignore[reportMissingImports]  (a peer, not a dependency)
    import onnx

    plain = folder / "float.onnx"
    export(start, plain, folder)
    kind = nncf.ModelType.TRANSFORMER if start.transformer else None
    onnx.save(nncf.quantize(onnx.load(plain), nncf.Dataset(Samples(start)), model_type=kind), file)


TORCH = ("torch", "torch.onnx", "onnx", "onnxscript")
PEER = (*TORCH, "onnxruntime", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference", "sympy")
METHODS = {
    "float": Method("float (torch.onnx.export)", export, TORCH),
    "downsize-float": Method("downsize, float", downsize_float, (*TORCH, "downsize")),
    "downsize": Method("downsize", downsize_int8, (*TORCH, "downsize")),
    "onnxruntime": Method("onnxruntime static", onnxruntime_static, PEER),
    "onnxruntime-placed": Method("onnxruntime static, placed by hand", onnxruntime_placed, PEER, transformers_only=True),
    "onnxruntime-dynamic": Method("onnxruntime dynamic", onnxruntime_dynamic, PEER, transformers_only=True),
    "nncf": Method("nncf", nncf_int8, (*TORCH, "onnxruntime", "nncf")),
}
BASELINE, OURS = "float", "downsize"
