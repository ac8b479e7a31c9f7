"""A small network whose file holds something of everything, and the tools to forge such files with a right checksum."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from downsize.errors import NetworkFileError
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


Record = dict[str, Any]


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


@functools.cache
def genuine(folder: Path) -> tuple[Record, dict[str, Tensor]]:
    """The header and tensors of a true file; copy before changing them."""
    victim().save(folder / "genuine")
    return read(folder / "genuine")


def node(record: Record, target: str) -> Record:
    """The record of the first node with that target."""
    return next(item for item in record["nodes"] if item["target"] == target)


def load(path: Path, record: Any, tensors: dict[str, Tensor]) -> Network:
    write(path, record, tensors)
    return Network.load(path)


def refused(path: Path, record: Any, tensors: dict[str, Tensor]) -> str:
    """The message with which a forged file is refused."""
    with pytest.raises(NetworkFileError) as caught:
        load(path, record, tensors)
    text = str(caught.value)
    assert len(text) < 1000 and text.isprintable()
    return text


def run(network: Network) -> tuple[Tensor, ...]:
    """The flat outputs at the sizes of the example, on zeros."""
    with torch.no_grad():
        return network.graph_module(*(torch.zeros(port.example, dtype=port.dtype) for port in network.ports))


def everywhere(record: Record, old: str, new: str) -> Record:
    """Rename a node, tensor or symbol in every place at once, so that references still fit."""

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {new if key == old else key: visit(item) for key, item in value.items()}
        if isinstance(value, list):
            return [visit(item) for item in value]
        return new if value == old else value

    return visit(record)


def with_calls(record: Record, *calls: tuple[str, list[Any]]) -> Record:
    """The record with further calls in front of its output, named c0, c1, ..."""
    made = copy.deepcopy(record)
    for number, (target, args) in enumerate(calls):
        call = {"name": f"c{number}", "op": "call_function", "target": target, "args": args, "kwargs": {}, "module": "", "source": ""}
        made["nodes"].insert(-1, call)
    return made


def words(text: str) -> list[str]:
    return text.split()
