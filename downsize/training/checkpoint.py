"""The state of a training on disk: safetensors with JSON in the header, replaced in one move; nothing is pickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainingError
from ..facts import VERSION
from ..network.network import Network
from .digest import digest

STATE = "state"  # the key of the JSON in the header
DIGEST = "sha256"  # and of the hash of JSON and tensors


def key_of(network: Network, *others: object) -> str:
    """A name for a training: a hash of the graph, of every tensor it starts from, which of them are trained or keep their zeros, of the others
    (see :func:`~.digest.digest`), and of the version."""
    tensors = {name: (tensor, tensor.requires_grad, network.sparse.get(name)) for name, tensor in network.named_tensors()}
    return digest(VERSION, network.graph_module.code, tensors, *others)[:20]


class Checkpoints:
    """One file, ``<folder>/<key>.safetensors``: the last state of one training.

    Args:
        folder: made when first written to; None: nothing is kept.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: str) -> None:
        self.key = key
        self.path = None if folder is None else Path(folder) / f"{key}.safetensors"

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state on disk, whole or not at all.

        Raises:
            TrainingError: it cannot be written.
        """
        if self.path is None:
            return
        draft = self.path.with_suffix(".part")
        # copies, because safetensors refuses tensors that share memory
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        state = json.dumps(facts)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(copies, draft, {STATE: state, DIGEST: self._digest(copies, state)})
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise TrainingError(f"the checkpoint {self.path} cannot be written ({error}): free some space, or give another folder.") from error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state on disk; None when there is none, or it is damaged or of another training: then training begins anew."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                found = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            whole = found[DIGEST] == self._digest(tensors, found[STATE])
            return (tensors, json.loads(found[STATE])) if whole else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _digest(self, tensors: Mapping[str, Tensor], state: str) -> str:
        made = hashlib.sha256(f"{self.key} {state}".encode())
        for name, tensor in sorted(tensors.items()):
            made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            made.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return made.hexdigest()
