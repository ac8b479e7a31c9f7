"""Networks written in one line, made int8 and written as files, and what runtimes make of the files."""

from __future__ import annotations

import atexit
import collections
import itertools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import drop_identities, fold_batch_norm, fold_padding
from downsize.runtimes import RUNTIMES
from downsize.structure import flatten, unflatten
from downsize.task import Task
from downsize.techniques.quantize import Quantize

needs_openvino = pytest.mark.skipif(RUNTIMES["openvino"].missing() is not None, reason="no openvino")
VOCABULARY = 50
FOLDER, NUMBERS = Path(tempfile.mkdtemp(prefix="downsize-tests-")), itertools.count()
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
FLOAT_LAYERS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMulNBits"}


class Net(nn.Module):
    """``Net(lambda net, x: ..., part=module or parameter, ...)``: a module whose forward is that function."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=options.pop("padding", size // 2), **options)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 3)


def like(example: Any, batch: int, seed: int) -> Any:
    """Random inputs of another batch size: normal floats, or token numbers."""
    generator = torch.Generator().manual_seed(seed)
    leaves, structure = flatten(example)
    made = []
    for leaf in leaves:
        shape = (batch, *leaf.shape[1:])
        floats = leaf.is_floating_point()
        made.append(torch.randn(shape, generator=generator).to(leaf.dtype) if floats else torch.randint(0, VOCABULARY, shape, generator=generator))
    return unflatten(structure, made)


def task_of(model: nn.Module, example: Any, batches: int = 6) -> Task:
    data = [(like(example, 4, seed), None) for seed in range(batches)]
    return Task(model, example, {"calibrate": lambda: data})


@dataclass
class Made:
    """A model, its network, the quantized network and its file; ``inputs`` were not calibrated on."""

    model: nn.Module
    network: Network
    quantized: Network
    path: Path
    inputs: Any


def plain(model: nn.Module, example: Any) -> Network:
    """The captured network as quantization begins with it."""
    network = capture(model.eval(), example)
    drop_identities(network)
    fold_batch_norm(network)
    fold_padding(network)
    return network


def int8(model: nn.Module, example: Any, **options: Any) -> Made:
    network = capture(model.eval(), example)
    quantized = Quantize(**options)(network, task_of(model, example))
    path = FOLDER / f"{next(NUMBERS)}.onnx"
    write(quantized, path)
    return Made(model, network, quantized, path, like(example, 8, 99))


def in_onnxruntime(path: Path) -> collections.Counter[str]:
    """How many nodes of each operator ONNX Runtime executes, after its own fusions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def in_openvino(made: Made) -> dict[str, set[str]]:
    """The types that OpenVINO's convolutions, products and sums compute in: operator -> kernels' types, from its profile."""
    found: dict[str, set[str]] = {}
    for operator in RUNTIMES["openvino"].profile(made.path, 1, made.inputs, 1):
        found.setdefault(operator.operator, set()).add(operator.detail.rpartition("_")[2])
    return found


def operators(network: Network) -> collections.Counter[str]:
    return collections.Counter(str(node.target).split(".")[1] for node in network.graph.nodes if node.op == "call_function")
