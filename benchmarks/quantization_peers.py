"""What other tools make of the models of quantization.py: onnxruntime.quantization, nncf, torchao, neural-compressor, torch's own LSTM in int8.

Tools that change ONNX files get the float file of downsize, and their file is judged. Tools that change torch modules get a copy of the module; it
is run in torch, which the row's name says, and its bytes are those of its saved state. A tool that is not installed has no rows.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Quality, Row
from torch import Tensor, nn

from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.task import Task

# pyright: reportMissingImports=false
# What is imported inside functions here is installed only where it is compared with.

KEPT = Path(__file__).parent.parent / "runs" / "quantization"
STATISTICS = 128  # batches, for tools that keep sums of what layers read
INPUTS = 16  # batches, for tools that keep all that layers read

Judge = Callable[[Any], Quality]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# Modules -----------------------------------------------------------------------------------------------------------------------------------


def answering(module: nn.Module) -> Callable[[Any], Tensor]:
    """A function from the inputs of a batch to the module's output, float32."""

    def answer(inputs: Any) -> Tensor:
        with torch.no_grad():
            return (module(**inputs) if isinstance(inputs, dict) else module(inputs)).float()

    return answer


def saved_bytes(module: nn.Module) -> int:
    """Bytes of the module's state as ``torch.save`` writes it."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def calibrated(module: nn.Module, task: Task, batches: int) -> nn.Module:
    """The module, run once on so many batches of the calibration data; what it gives, if anything, is not looked at."""
    with torch.no_grad():
        for inputs, _ in itertools.islice(task.batches("calibrate"), batches):
            module(**inputs) if isinstance(inputs, dict) else module(inputs)
    return module


def copied(model: Any) -> nn.Module:
    return copy.deepcopy(model).eval()


# Cases -------------------------------------------------------------------------------------------------------------------------------------


def minilm(original: Network, task: Task, judge: Judge) -> Iterator[Row]:
    """Matrices at 4 and at 8 bits, and tables where the tool has them; else tables stay float and the bytes tell."""
    makes: dict[str, Callable[[Path], Any]] = {
        "onnxruntime.quantization: 4 bits to nearest, 32": lambda file: onnxruntime_blocks(float_file(original, "minilm"), file, "nearest", 32),
        "onnxruntime.quantization: 4 bits HQQ, 32": lambda file: onnxruntime_blocks(float_file(original, "minilm"), file, "hqq", 32),
        "onnxruntime.quantization: 4 bits to nearest, 128": lambda file: onnxruntime_blocks(float_file(original, "minilm"), file, "nearest", 128),
    }
    if installed("nncf"):
        makes |= {
            "nncf: 4 bits, scale estimation, 32, tables in 8": lambda file: nncf_four(float_file(original, "minilm"), file, task, 32),
            "nncf: 8 bits, weights alone": lambda file: nncf_eight(float_file(original, "minilm"), file),
            "nncf: 8 bits, static": lambda file: nncf_static(float_file(original, "minilm"), file, task, transformer=True),
        }
    if installed("torchao"):
        makes |= {
            "torchao: 4 bits HQQ, 32, tables in 8 (in torch)": lambda _: torchao_four(task, False),
            "torchao: 4 bits AWQ, 32, tables in 8 (in torch)": lambda _: torchao_four(task, True),
            "torchao: 8 bits, weights alone (in torch)": lambda _: torchao_eight(task, "Int8WeightOnlyConfig"),
            "torchao: 8 bits, dynamic (in torch)": lambda _: torchao_eight(task, "Int8DynamicActivationInt8WeightConfig"),
        }
    if installed("neural_compressor"):
        makes |= {
            "neural-compressor: 4 bits HQQ, 32, tables in 16 (in torch)": lambda _: neural_hqq(task.model, 4, 32),
            "neural-compressor: 4 bits GPTQ, 32, tables float (in torch)": lambda _: neural_gptq(task, 4, 32),
            "neural-compressor: 8 bits, static, tables float (in torch)": lambda _: neural_static(task),
        }
    yield from rows_of(makes, judge)


def lite0(original: Network, task: Task, judge: Judge) -> Iterator[Row]:
    """8 bits static; 4-bit weights where a tool has them for convolutions."""
    makes: dict[str, Callable[[Path], Any]] = {}
    if installed("nncf"):
        makes["nncf: 8 bits, static"] = lambda file: nncf_static(float_file(original, "lite0"), file, task, transformer=False)
    if installed("torchao"):
        makes["torchao: 8 bits, static (in torch)"] = lambda _: torchao_static(task)
        makes["torchao: 4 bits, depthwise weights float, to nearest (in torch)"] = lambda _: torchao_few(task.model, 4)
    if installed("neural_compressor"):
        makes["neural-compressor: 8 bits, static (in torch)"] = lambda _: neural_static(task)
    yield from rows_of(makes, judge)


def characters(model: nn.Module, judge: Judge) -> Iterator[Row]:
    """torch's own dynamic int8; the other tools leave an LSTM float."""

    def dynamic(_: Path) -> nn.Module:
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copied(model), {nn.LSTM, nn.Linear}, dtype=torch.qint8)

    yield from rows_of({"torch.ao.quantization: dynamic (in torch)": dynamic}, judge)


def lenet(model: nn.Module, judge: Judge) -> Iterator[Row]:
    """3 and 2 bits a weight, all layers, one scale a row where the tool's rounding has no groups."""
    for bits in (3, 2):
        makes: dict[str, Callable[[Path], Any]] = {}
        if installed("torchao"):
            makes[f"torchao: {bits} bits, to nearest (in torch)"] = lambda _, bits=bits: torchao_few(model, bits)
        if installed("neural_compressor"):
            makes[f"neural-compressor: {bits} bits, to nearest, clipped (in torch)"] = lambda _, bits=bits: neural_clipped(model, bits)
            makes[f"neural-compressor: {bits} bits HQQ, a scale for 40 columns (in torch)"] = lambda _, bits=bits: neural_hqq(model, bits, 40)
        yield from rows_of(makes, judge)


def rows_of(makes: dict[str, Callable[[Path], Any]], judge: Judge) -> Iterator[Row]:
    for name, make in makes.items():
        file = KEPT / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}.onnx"
        yield Row(name, lambda make=make, file=file: make(file), judge)


# ONNX files --------------------------------------------------------------------------------------------------------------------------------


def float_file(original: Network, name: str) -> Path:
    KEPT.mkdir(parents=True, exist_ok=True)
    write(original, KEPT / f"{name}-float.onnx")
    return KEPT / f"{name}-float.onnx"


def onnxruntime_blocks(plain: Path, file: Path, method: str, group: int) -> Path:
    """Products and tables in 4 bits by ``onnxruntime.quantization.matmul_nbits_quantizer``; what it has for tables is rounding to nearest."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    def quantized(model: Any, config: Any) -> Any:
        made = nbits.MatMulNBitsQuantizer(model, algo_config=config)
        made.process()
        wrapped: Any = made.model
        return wrapped.model

    model = onnx.load(plain)
    if method == "hqq":
        model = quantized(model, nbits.HQQWeightOnlyQuantConfig(block_size=group, bits=4))
    operators = ("Gather",) if method == "hqq" else ("MatMul", "Gather")
    config = nbits.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=False, accuracy_level=0, op_types_to_quantize=operators)
    onnx.save(quantized(model, config), file)
    return file


def nncf_eight(plain: Path, file: Path) -> Path:
    """Weights of all layers and tables in asymmetric 8 bits, a scale a row."""
    import nncf
    import onnx

    onnx.save(nncf.compress_weights(onnx.load(plain), mode=nncf.CompressWeightsMode.INT8_ASYM), file)
    return file


def nncf_four(plain: Path, file: Path, task: Task, group: int) -> Path:
    """Matrices in asymmetric 4 bits, scales by their error on 128 batches of the calibration data; tables and the last matrix in 8, as by default."""
    import nncf
    import onnx
    from onnx.version_converter import convert_version

    # Below opset 21 the tool writes zero points for MatMulNBits in a shape that ONNX Runtime refuses.
    model = convert_version(onnx.load(plain), 21)
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": group, "scale_estimation": True}
    made = nncf.compress_weights(model, dataset=nncf.Dataset(arrays(model, task, STATISTICS)), **options)
    onnx.save(made, file)
    return file


def nncf_static(plain: Path, file: Path, task: Task, transformer: bool) -> Path:
    """``nncf.quantize``: a transformer by its model type, a convolutional network with the slower, more exact bias correction."""
    import nncf
    import onnx

    model = onnx.load(plain)
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {"fast_bias_correction": False}
    made = nncf.quantize(model, nncf.Dataset(arrays(model, task, STATISTICS)), subset_size=STATISTICS, **options)
    onnx.save(made, file)
    return file


def arrays(model: Any, task: Task, batches: int) -> list[dict[str, np.ndarray]]:
    """Calibration batches by the names of the ONNX model's inputs."""
    found = []
    for inputs, _ in itertools.islice(task.batches("calibrate"), batches):
        given: dict[str, Any] = inputs if isinstance(inputs, dict) else {model.graph.input[0].name: inputs}
        found.append({name: np.asarray(value) for name, value in given.items()})
    return found


# torchao -----------------------------------------------------------------------------------------------------------------------------------


def tables_in_eight(module: nn.Module) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    quantize_(module, IntxWeightOnlyConfig(weight_dtype=torch.int8), lambda layer, _: isinstance(layer, nn.Embedding))
    return module


def torchao_four(task: Task, awq: bool) -> nn.Module:
    """Matrices in 4 bits for the CPU's own kernel, which wants bfloat16 around it; tables in 8, as tables of 4 bits are saved in bytes."""
    from torchao.prototype.awq import AWQConfig
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    module, solver = copied(task.model).to(torch.bfloat16), Int4ChooseQParamsAlgorithm.HQQ
    config = PrototypeInt4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm=solver, set_inductor_config=False)
    if awq:
        quantize_(module, AWQConfig(config, step="prepare"))
        quantize_(calibrated(module, task, INPUTS), AWQConfig(config, step="convert"))
    else:
        quantize_(module, config)
    return tables_in_eight(module)


def torchao_eight(task: Task, config: str) -> nn.Module:
    """Matrices by a configuration of ``torchao.quantization`` with its defaults, tables in 8 bits with a scale a row."""
    import torchao.quantization

    module = copied(task.model)
    torchao.quantization.quantize_(module, getattr(torchao.quantization, config)(set_inductor_config=False))
    return tables_in_eight(module)


def torchao_few(model: Any, bits: int) -> nn.Module:
    """Weights to nearest, asymmetric, a scale a row (of a convolution: for each output and place of the kernel); saved in bytes.

    Grouped convolutions, which the tool fails on, stay float.
    """
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_

    module = copied(model)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), mapping_type=MappingType.ASYMMETRIC)
    quantize_(module, config, lambda layer, _: isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
    return module


# Both that work on exported graphs ---------------------------------------------------------------------------------------------------------


def torchao_static(task: Task) -> nn.Module:
    """Weights and activations in 8 bits as the quantizer for x86 places them, on 128 batches."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    inputs, shapes = example_of(task)
    graph: Any = torch.export.export(plain_convolutions(copied(task.model)), inputs, dynamic_shapes=shapes, strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    made: Any = convert_pt2e(calibrated(prepare_pt2e(graph, quantizer), task, STATISTICS))
    read = {node.target for node in made.graph.nodes if node.op == "get_attr"}
    for name in set(made.state_dict()) - read:  # the float weights, which the integers have replaced
        owner, _, tensor = name.rpartition(".")
        delattr(made.get_submodule(owner), tensor)
    return made


def plain_convolutions(module: nn.Module) -> nn.Module:
    """Convolutions of classes of their own that pad before they convolve, as a padding and an ``nn.Conv2d``, the only class the quantizer knows."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d) and type(layer) is not nn.Conv2d and hasattr(layer, "static_padding"):
                sizes: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation
                plain = nn.Conv2d(layer.in_channels, layer.out_channels, *sizes, groups=layer.groups, bias=layer.bias is not None)
                plain.load_state_dict(layer.state_dict())
                padding: Any = layer.static_padding
                setattr(parent, name, nn.Sequential(padding, plain))
    return module.eval()


def neural_static(task: Task) -> nn.Module:
    """The same by neural-compressor's defaults. It leaves weights float in front of their quantizers, and so they are saved."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    inputs, shapes = example_of(task)
    graph: Any = export(plain_convolutions(copied(task.model)), inputs, dynamic_shapes=shapes)
    return convert(calibrated(prepare(graph, get_default_static_config()), task, STATISTICS))


def example_of(task: Task) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """A batch of the calibration data as a call, and which of its dimensions vary: the first, and of token numbers the second."""
    batch = next(iter(task.batches("calibrate")))[0]
    inputs = tuple(batch.values()) if isinstance(batch, dict) else (batch,)
    samples, tokens = torch.export.Dim("samples", min=1, max=64), torch.export.Dim("tokens", min=2, max=512)
    return inputs, tuple({0: samples, 1: tokens} if value.ndim == 2 else {0: samples} for value in inputs)


# neural-compressor, layer by layer ---------------------------------------------------------------------------------------------------------


def neural_hqq(model: Any, bits: int, group: int) -> nn.Module:
    """HQQ of linear layers, zero points kept float; the tool makes what it does not quantize float16."""
    from neural_compressor.torch.quantization import HQQConfig, convert, prepare

    return convert(prepare(copied(model), HQQConfig(bits=bits, group_size=group, quant_zero=False)))


def neural_clipped(model: Any, bits: int) -> nn.Module:
    """Linear layers to nearest, asymmetric, a scale a row, ranges clipped by squared error."""
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    config = RTNConfig(bits=bits, group_size=-1, use_sym=False, use_mse_search=True, use_layer_wise=False)
    return convert(prepare(copied(model), config))


def neural_gptq(task: Task, bits: int, group: int) -> nn.Module:
    """GPTQ of the layers in transformer blocks on 128 batches, asymmetric, scales by squared error."""
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    # The tool looks this path up even where it reads nothing from it.
    config = GPTQConfig(bits=bits, group_size=group, use_sym=False, use_mse_search=True, model_path=str(KEPT))
    return convert(calibrated(prepare(copied(task.model), config), task, STATISTICS))
