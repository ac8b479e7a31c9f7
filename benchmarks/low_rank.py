"""Low rank: layers as products of smaller ones, beside other tools and beside plain truncation, with and without training.

    python benchmarks/low_rank.py                               # everything: an hour
    python benchmarks/low_rank.py --case resnet --seed 0        # one case, one seed
    python benchmarks/low_rank.py --show --markdown             # the tables of what was run so far

Results are added to runs/low_rank/results.json line by line; a line that is there already is not made again. All figures are of the written
ONNX file in ONNX Runtime. What is measured, and how, stands in benchmarks/README.md.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fashion
import language
import torch
from pruning_models import SUBJECTS, Subject
from rows import Quality, Row, main, measured
from torch import nn
from training_data import fashion_validation, sentence_batches
from training_fashion import EXAMPLE, RESNET_EPOCHS, dense, score, task_of
from training_real import quality_of

from downsize.measure import latency
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.progress import Progress
from downsize.runtimes import open_artifact
from downsize.scores import top1
from downsize.task import Task
from downsize.techniques.compensate import Compensate
from downsize.techniques.distill import Distill
from downsize.techniques.factorize import Factorize
from downsize.techniques.finetune import Finetune
from downsize.techniques.quantize import Quantize

KEPT = Path(__file__).parent.parent / "runs" / "low_rank"
TIMED = 15.0  # seconds
EPOCHS = 1.0
STEPS = 1000


def resnet(seed: int) -> Iterator[Row]:
    """The small ResNet on Fashion-MNIST at half the MACs."""
    model = dense(fashion.SmallResNet, seed, RESNET_EPOCHS, 0.2)
    task, start = task_of(model), capture(model, EXAMPLE)
    yield Row("dense", lambda: start, score)
    data: dict[str, Any] = {"samples": fashion.CALIBRATION}
    yield Row(
        "plain truncation: one form, the same share of each layer", lambda: Factorize(ratio=0.5, samples=0, forms=("tucker",))(start, task), score
    )
    yield Row("tensorly: Tucker, the same share of each layer", lambda: capture(by_tensorly(model), EXAMPLE), score)
    if importlib.util.find_spec("aimet_torch"):
        yield Row("AIMET: spatial SVD, greedy ranks", lambda: capture(by_aimet(model), EXAMPLE), score)
    yield Row("half the MACs, not trained", lambda: Factorize(macs=0.5, **data)(start, task), score)
    plan: dict[str, Any] = {"epochs": EPOCHS, "rate": 0.05, "optimizer": "sgd", "decay": 5e-4, "warmup": 0.1}
    taught: dict[str, Any] = {**plan, "outputs": "logits", "temperature": 4.0, "weight": 0.9}
    longer: dict[str, Any] = taught | {"epochs": 3.0}
    whole = Factorize(macs=0.5, fold=False, **data)
    yield Row("half the MACs, distilled for one epoch", lambda: Distill(**taught)(whole(start, task), task), score)
    yield Row(
        "half the MACs, ranks learned in three epochs",
        lambda: Factorize(macs=0.5, fold=False, train=Distill(**longer))(start, task),
        score,
    )


def by_tensorly(model: nn.Module) -> nn.Module:
    """Every convolution with a kernel as three, by tensorly's Tucker-2, of ranks that leave about half its MACs; no calibration, no repair."""
    import copy

    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    made = copy.deepcopy(model)
    for parent in list(made.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1 and min(layer.weight.shape[:2]) > 1:
                ranks = _halved(layer)
                found: Any = partial_tucker(layer.weight.detach(), rank=ranks, modes=[0, 1])
                (core, (outer, inner)), _ = found
                first, last = (
                    nn.Conv2d(layer.in_channels, ranks[1], 1, bias=False),
                    nn.Conv2d(ranks[0], layer.out_channels, 1, bias=layer.bias is not None),
                )
                geometry: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation
                middle = nn.Conv2d(ranks[1], ranks[0], *geometry, bias=False)
                with torch.no_grad():
                    first.weight.copy_(inner.T[:, :, None, None])
                    middle.weight.copy_(core)
                    last.weight.copy_(outer[:, :, None, None])
                    if layer.bias is not None and last.bias is not None:
                        last.bias.copy_(layer.bias)
                setattr(parent, name, nn.Sequential(first, middle, last))
    return made.eval()


def by_aimet(model: nn.Module) -> nn.Module:
    """AIMET's spatial SVD of all convolutions at half the MACs, ranks by its greedy search on ten batches with classes; no fine-tuning."""
    from decimal import Decimal

    import aimet_torch.compress as aimet  # pyright: ignore[reportMissingImports]  (a peer, not a dependency)
    from aimet_torch.common.defs import CompressionScheme, CostMetric  # pyright: ignore[reportMissingImports]
    from aimet_torch.defs import GreedySelectionParameters, SpatialSvdParameters  # pyright: ignore[reportMissingImports]

    def accuracy(made: nn.Module, batches: int | None, use_cuda: bool = False) -> float:
        with torch.no_grad():
            return top1(made, itertools.islice(fashion_validation(), batches))

    search = GreedySelectionParameters(target_comp_ratio=Decimal("0.5"), num_comp_ratio_candidates=10)
    asked = SpatialSvdParameters(mode=SpatialSvdParameters.Mode.auto, params=SpatialSvdParameters.AutoModeParams(search, modules_to_ignore=[]))
    scheme = {"compress_scheme": CompressionScheme.spatial_svd, "cost_metric": CostMetric.mac, "parameters": asked, "trainer": None}
    made, _ = aimet.ModelCompressor.compress_model(model, accuracy, 10, (1, *EXAMPLE.shape[1:]), **scheme)
    return made.eval()


def _halved(layer: nn.Conv2d) -> tuple[int, int]:
    """Equal shares of outputs and inputs whose core and two products have at most half the layer's weights."""
    rows, columns, *kernel = layer.weight.shape
    size = kernel[0] * kernel[1]
    for rank in range(min(rows, columns), 0, -1):
        outer, inner = max(1, rank * rows // min(rows, columns)), max(1, rank * columns // min(rows, columns))
        if outer * rows + outer * inner * size + inner * columns <= rows * columns * size / 2:
            return outer, inner
    return 1, 1


def minilm(seed: int) -> Iterator[Row]:
    """all-MiniLM-L6-v2 at half the MACs; speed in ONNX Runtime, one thread, one sentence."""
    subject = SUBJECTS["minilm"]
    start = subject.start()
    assert start.model is not None
    data = {"calibrate": start.calibrate, "train": sentence_batches}
    task = Task(start.model, start.example, data, checkpoints=KEPT / "checkpoints", progress=Progress())
    original = capture(task.model, task.example, more=task.variations())
    judge = judge_of(task, subject, original)
    yield Row("float", lambda: original, judge)
    half: dict[str, Any] = {"macs": 0.5, "what": ("linear",)}
    yield Row(
        "half the MACs, plain SVD, the same share of each layer",
        lambda: Factorize(ratio=0.5, what=("linear",), samples=0, joint=False)(original, task),
        judge,
    )
    made: dict[str, Network] = {}

    def factored() -> Network:
        if not made:
            made["half"] = Factorize(**half, samples=subject.samples)(original, task)
        return made["half"]

    yield Row("half the MACs, not trained", factored, judge)
    plan = Distill(steps=STEPS, rate=4e-4, outputs="embedding", freeze=("*embeddings*",), seed=seed)
    yield Row("half the MACs, distilled", lambda: plan(factored(), task), judge)
    yield Row("8 bits", lambda: Quantize()(original, task), judge)
    yield Row("half the MACs, 8 bits", lambda: Quantize()(factored(), task), judge)
    coarse: dict[str, Any] = {"bits": 3, "group": 128, "symmetric": False, "activations": "none", "rounding": "nearest"}
    yield Row("3 bits to nearest", lambda: Quantize(**coarse)(original, task), judge)
    yield Row("3 bits to nearest, branches of rank 16", lambda: Compensate(rank=16)(Quantize(**coarse)(original, task), task), judge)


def judge_of(task: Task, subject: Subject, original: Network) -> Callable[[Network], Quality]:
    """Figures of the written file, its MACs and bytes, and the float file's time over its own, both in one process in turn."""

    def judge(made: Network) -> Quality:
        with tempfile.TemporaryDirectory() as folder:
            file, baseline = Path(folder, "model.onnx"), Path(folder, "float.onnx")
            write(made, file)
            write(original, baseline)
            found = quality_of(open_artifact(file, "onnxruntime", 1), task, subject)
            ratio = latency(file, subject.sample(), "onnxruntime", 1, baseline=baseline, seconds=TIMED)["latency_ratio"]
            assert ratio.low is not None and ratio.high is not None
            speed = {"speed": 1 / ratio.value, "speed from": 1 / ratio.high, "to": 1 / ratio.low}
            return found | {"MMACs": count(made, subject.sample()).macs / 1e6, "MB": file.stat().st_size / 1e6} | speed

    return judge


def words(seed: int) -> Iterator[Row]:
    """A small language model whose table is its last layer, too: the loss on text that was held back."""
    model = language.trained(seed)
    data: dict[str, Any] = {"calibrate": language.calibrate, "train": language.Training}
    example = next(language.held())[0][:2]
    task = Task(model, example, data, loss=language.loss, checkpoints=KEPT / "checkpoints", progress=Progress())
    start = capture(model, example)
    judge = lambda network: measured(network, example[:1], language.mean_loss)  # noqa: E731
    yield Row("float", lambda: start, judge)
    half: dict[str, Any] = {"parameters": 0.5}
    yield Row("0.7 of the parameters", lambda: Factorize(parameters=0.7)(start, task), judge)
    yield Row("half the parameters, by the weights alone", lambda: Factorize(**half, samples=0)(start, task), judge)
    yield Row("half the parameters", lambda: Factorize(**half)(start, task), judge)
    yield Row("half the parameters, trained", lambda: Finetune(steps=300, rate=1e-3)(Factorize(**half)(start, task), task), judge)
    yield Row("8 bits", lambda: Quantize()(start, task), judge)
    yield Row("half the parameters, 8 bits", lambda: Quantize()(Factorize(**half)(start, task), task), judge)


CASES = {"resnet": resnet, "minilm": minilm, "words": words}
SEEDS = {"resnet": (0, 1, 2), "minilm": (0,), "words": (0,)}

if __name__ == "__main__":
    sys.exit(main((__doc__ or "").partition("\n")[0], CASES, SEEDS, "runs/low_rank/results.json"))
