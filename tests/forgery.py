"""A small network whose file holds something of everything, and the tools to forge such files with a right checksum."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from downsize.network.capture import capture
from downsize.network.file import KEY, checksum
from downsize.network.network import Network


class Victim(nn.Module):
    """Tied weights, constants in and out, sizes in arithmetic, keywords, texts, dtypes, infinities and several results of one operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.embedding.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, ids: Tensor, top: float = 1.0, nothing: Any = None) -> dict[str, Any]:
        x = F.gelu(self.norm(self.conv(F.pad(x, [1, 1, 1, 1], mode="reflect"))), approximate="tanh").clamp(max=top)
        one, two = self.dropout(x).view(x.shape[0], 4, x.shape[2] * x.shape[3]).chunk(2, 1)
        y = self.embedding(ids)
        y = F.scaled_dot_product_attention(y, y, y, scale=0.25)
        return {"logits": self.out(y), "rest": (one + two, [y.sum(1).to(torch.float64), "text", None])}

    @staticmethod
    def example(batch: int) -> dict[str, Any]:
        made = torch.Generator().manual_seed(batch)
        x, ids = torch.randn(batch, 2, 6, 6, generator=made), torch.randint(0, 9, (batch, 5), generator=made)
        return {"ids": ids, "x": x, "top": float("inf"), "nothing": None}


@functools.cache
def victim() -> Network:
    return capture(Victim().eval(), Victim.example(2), more=[{**Victim.example(2), "x": torch.randn(2, 2, 5, 7)}])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a network file."""
    with safe_open(path, framework="pt") as archive:
        return json.loads(archive.metadata()[KEY].partition("\n")[2]), {name: archive.get_tensor(name) for name in list(archive.keys())}


def write(path: Path, record: Any, tensors: dict[str, Tensor]) -> None:
    """Forge a network file: any header over any tensors, with the checksum that a true one would have."""
    text = record if isinstance(record, str) else json.dumps(record)
    save_file(tensors, path, metadata={KEY: f"{checksum(text, tensors)}\n{text}"})
