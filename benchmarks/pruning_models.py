"""What is pruned in the benchmark: five models, each with calibration data, the amounts asked for, and data to judge on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import crops
import fashion
import numpy as np
import texts
import torch
from models import SUBJECTS as QUANTIZED
from models import Batches, Start, example, lite0, minilm, noise, resnet18
from scipy.stats import spearmanr
from torch import nn

from downsize.numerics.agreement import Comparison, cosines

CROPS = 800
TEXT_SAMPLE = "An example of what is encoded, as long as the sentences of a documentation are, which is about twenty-five words or some more."

Outputs = list[np.ndarray]
Quality = Callable[[Outputs, Outputs, "list[torch.Tensor | None]"], dict[str, float]]


@dataclass(frozen=True)
class Amount:
    """How much is asked for: ``left`` is the share of the MACs, units or layers that stays."""

    kind: str  # "macs": of all multiply-accumulates; "ratio": of the units of every layer; "layers": of the repeated layers
    left: float

    def __str__(self) -> str:
        return {"macs": "{:.3g} of the MACs", "ratio": "{:.3g} of the units", "layers": "{:.3g} of the layers"}[self.kind].format(self.left)


@dataclass(frozen=True)
class Subject:
    """A model to prune.

    Attributes:
        start: the model, an example, and unlabelled calibration data, of which methods may use ``samples`` at most.
        judged: data by role; with classes where there are any.
        quality: from the original's outputs, the file's outputs (one array a batch) and the classes, to named numbers.
        sample: the one input that is timed and whose MACs are counted.
        kept: the layers whose outputs must keep their width, as a user of Torch-Pruning has to name them.
        heads: for every layer that makes queries, keys or values, how many heads it makes.
        timed: whether speed is measured.
    """

    name: str
    start: Callable[[], Start]
    samples: int
    amounts: tuple[Amount, ...]
    judged: dict[str, Batches]
    quality: Quality
    sample: Callable[[], Any]
    kept: Callable[[nn.Module], list[nn.Module]]
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda _: {}
    timed: bool = True


# What is told of the outputs -------------------------------------------------------------------------------------------------------------


def class_quality(expected: Outputs, came: Outputs, classes: list[torch.Tensor | None]) -> dict[str, float]:
    """Share of samples with the same largest class, norm of the difference over that of the original's scores, KL in nats; and top-1."""
    comparison = Comparison()
    for one, other in zip(expected, came, strict=True):
        comparison.add([one], [other])
    found = comparison.agreement()
    assert found.top1 is not None and found.kl is not None  # so for tables of scores
    quality = {"agreement": found.top1, "relative error": found.relative_error, "KL": found.kl}
    right = [scores.argmax(1) == known.numpy() for scores, known in zip(came, classes, strict=True) if known is not None]
    return quality if not right else {"top-1": float(np.concatenate(right).mean()), **quality}


def embedding_quality(expected: Outputs, came: Outputs, classes: list[torch.Tensor | None]) -> dict[str, float]:
    """Mean cosine to the original's embeddings, its 5th percentile, and the rank correlation of the similarities of all pairs."""
    one, other = np.concatenate(expected), np.concatenate(came)
    cosine = cosines([one], [other])
    pairs = np.triu_indices(len(one), 1)
    ranks: Any = spearmanr((one @ one.T)[pairs], (other @ other.T)[pairs])
    return {"cosine": float(cosine.mean()), "5th percentile": float(np.quantile(cosine, 0.05)), "Spearman": float(ranks.statistic)}


# The models -------------------------------------------------------------------------------------------------------------------------------


def lenet() -> Start:
    return grey(fashion.lenet())


def small_resnet() -> Start:
    return grey(fashion.small_resnet())


def grey(model: nn.Module) -> Start:
    return Start(model, torch.zeros(1, 1, 28, 28), fashion.calibrate, {"pixels": {0: "batch"}})


def varied_lite0() -> Start:
    start = lite0()
    start.calibrate = lambda: crops.augmented(CROPS)
    return start


def mixed_minilm() -> Start:
    start = minilm()
    start.calibrate = lambda: texts.batches(texts.calibration())
    return start


def last(model: nn.Module) -> list[nn.Module]:
    """The layer that makes the class scores."""
    return [[module for module in model.modules() if isinstance(module, nn.Linear)][-1]]


def residual_width(model: nn.Module) -> list[nn.Module]:
    """The layers of a BERT that write into the residual stream: its width is the embedding's, which users compare with others."""
    named = dict(model.named_modules())
    return [module for name, module in named.items() if isinstance(module, nn.Embedding) or name.endswith("output.dense")]


def bert_heads(model: nn.Module) -> dict[nn.Module, int]:
    from transformers.models.bert.modeling_bert import BertSelfAttention

    attentions = [module for module in model.modules() if isinstance(module, BertSelfAttention)]
    return {layer: module.num_attention_heads for module in attentions for layer in (module.query, module.key, module.value)}


def sentence() -> Any:
    return example("sentences").encode([TEXT_SAMPLE])


def macs(*shares: float) -> tuple[Amount, ...]:
    return tuple(Amount("macs", share) for share in shares)


SUBJECTS = {
    "lenet": Subject(
        name="LeNet-300-100, Fashion-MNIST",
        start=lenet,
        samples=fashion.CALIBRATION,
        amounts=(Amount("ratio", 0.5), Amount("ratio", 0.25), Amount("ratio", 0.15)),
        judged={"test": fashion.test},
        quality=class_quality,
        sample=lambda: torch.zeros(1, 1, 28, 28),
        kept=last,
        timed=False,
    ),
    "small-resnet": Subject(
        name="small ResNet, Fashion-MNIST",
        start=small_resnet,
        samples=fashion.CALIBRATION,
        amounts=macs(0.5),
        judged={"test": fashion.test},
        quality=class_quality,
        sample=lambda: torch.zeros(1, 1, 28, 28),
        kept=last,
        timed=False,
    ),
    "lite0": Subject(
        name="EfficientNet-Lite0",
        start=varied_lite0,
        samples=CROPS,
        amounts=macs(0.9, 0.75, 0.5),
        judged=QUANTIZED["lite0"].judged,
        quality=class_quality,
        sample=QUANTIZED["lite0"].sample,
        kept=last,
    ),
    "minilm": Subject(
        name="all-MiniLM-L6-v2",
        start=mixed_minilm,
        samples=texts.CALIBRATION,
        amounts=(*macs(1 / 1.5, 1 / 2), Amount("layers", 0.5)),
        judged={
            "held": lambda: texts.batches(texts.held()),
            "licences": lambda: texts.batches(texts.licences()),
            "descriptions": lambda: texts.batches(texts.descriptions()),
        },
        quality=embedding_quality,
        sample=sentence,
        kept=residual_width,
        heads=bert_heads,
    ),
    "resnet18": Subject(
        name="ResNet-18",
        start=resnet18,
        samples=64,
        amounts=(Amount("ratio", 0.5),),
        judged={"noise": lambda: noise(64, 224, seed=3)},
        quality=class_quality,
        sample=QUANTIZED["resnet18"].sample,
        kept=last,
    ),
}


def recorded(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Any, torch.Tensor | None, np.ndarray]]:
    """Each batch's inputs and classes with the original's outputs."""
    with torch.no_grad():
        for inputs, classes in batches:
            yield inputs, classes, (model(**inputs) if isinstance(inputs, dict) else model(inputs)).numpy()
