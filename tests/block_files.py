"""The law that files and simulations agree, for products whose input a runtime rounds in blocks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

import downsize as ds
from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.structure import flatten

BLOCKS = torch.ops.downsize.fake_quantize_blocks.default


def product_inputs(model: onnx.ModelProto) -> list[str]:
    """The values that products round by themselves, in the order in which they are first read."""
    found = [
        node.input[0]
        for node in model.graph.node
        if node.op_type == "MatMulNBits" and any(one.name == "accuracy_level" and one.i == 4 for one in node.attribute)
    ]
    return list(dict.fromkeys(found))


def scales(x: Tensor, group: int) -> Tensor:
    """The step of every entry."""
    columns = x.shape[-1]
    filled = torch.nn.functional.pad(x, (0, -columns % group)).unflatten(-1, (-1, group))
    return (filled.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127).expand(filled.shape).flatten(-2)[..., :columns]


def law(network: Network, path: Path, inputs: Any) -> float:
    """What products of the file round differs from the simulation by at most one code, in 0.5 % of the entries; from the file's codes the same
    outputs follow, to 1e-4 of the largest value. Returns the part that differs. Blocks that no kernel rounds are compared by the outputs."""
    model = onnx.load(path)
    names, count = product_inputs(model), len(model.graph.output)
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    del model.metadata_props[:]
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder, "inputs.onnx"))
        session = ds.open(Path(folder, "inputs.onnx"), runtime="onnxruntime")
        outputs: list[np.ndarray] = session.run(session.arrays(tuple(network.flat(inputs))))
    found = [torch.from_numpy(np.asarray(one)) for one in outputs[count:]]
    read = [source for node in network.graph.nodes for source in node.all_input_nodes if source.target is BLOCKS]
    nodes = list(dict.fromkeys(read))
    seen = {"entries": 0, "off": 0}

    def compare(number: int) -> Any:
        def hook(args: tuple[Any, ...], value: Tensor) -> Tensor:
            there = BLOCKS(found[number], args[1])
            gap = ((value - there) / scales(found[number], args[1])).abs()
            # Blocks whose extreme differs in the last place have another step, by as little.
            seen["entries"], seen["off"] = seen["entries"] + gap.numel(), seen["off"] + int((gap > 0.5).sum())
            assert not gap.numel() or float(gap.max()) <= 1.01
            return there

        return hook

    if len(names) == len(nodes):
        results = walk(network, network.flat(inputs), {node: compare(number) for number, node in enumerate(nodes)})
    else:
        results = tuple(flatten(network.predict(inputs))[0])
    assert seen["off"] <= 0.005 * max(seen["entries"], 1), seen
    for one, two in zip(results, outputs[:count], strict=True):
        one = one.detach()
        assert float((one - torch.from_numpy(two)).abs().max()) <= 1e-4 * float(one.abs().max())
    return seen["off"] / max(seen["entries"], 1)
