"""The state of a training on disk: safetensors with JSON in the header, replaced in one move; nothing is pickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainingError
from ..network.network import Network

STATE = "state"  # the key of the JSON in the header


def key_of(network: Network, *settings: object) -> str:
    """A name for a training: a hash of the graph, of every tensor it starts from, and of the settings."""
    digest = hashlib.sha256(network.graph_module.code.encode() + repr(settings).encode())
    for name, tensor in network.named_tensors():
        value = tensor.detach().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode() + value.flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()[:20]


class Checkpoints:
    """One file, ``<folder>/<key>.safetensors``: the last state of one training.

    Args:
        folder: made when first written to; None: nothing is kept.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if folder is None else Path(folder) / f"{key}.safetensors"

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state on disk, whole or not at all.

        Raises:
            TrainingError: it cannot be written.
        """
        if self.path is None:
            return
        draft = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # safetensors refuses tensors that share memory
            save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, draft, {STATE: json.dumps(facts)})
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise TrainingError(f"the checkpoint {self.path} cannot be written ({error}): free some space, or give another folder.") from error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state on disk; None when there is none, or it cannot be read: then training begins anew."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()[STATE])
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (it is no dict)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
