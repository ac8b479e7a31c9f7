"""A teacher's outputs, kept a sample at a time, so that an epoch over the same data asks it nothing twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..network.network import batch_of
from ..structure import flatten, looks_like_tensor, unflatten

LIMIT = 64 * 2**20  # bytes
# What a row costs beside its values: its key, and where it is.
OVERHEAD = 256
DIGEST = 16
# Once full, so many times its own rows may come, none of them known, before it gives up.
PATIENCE = 4
TOLERANCE = 1e-4


class Answers(nn.Module):
    """The flat outputs of ``predict`` for a batch's inputs, without gradients; those of samples that came before are not computed again.

    A sample is known by a hash of its inputs' bytes. Outputs are kept only if all inputs and outputs have the batch first and a trial shows
    that a row's outputs do not depend on the other rows (within 1e-4 of the largest value); at most ``limit`` bytes of them. Where data is
    augmented, no sample comes twice: when the room is full and nothing came again for long, all is dropped, and nothing hashed any more.

    What is kept is part of the module's state: a row that was computed in another batch may differ in its last bit.
    """

    def __init__(self, predict: Callable[[Any], Any], limit: int = LIMIT) -> None:
        super().__init__()
        self.predict, self.limit = predict, limit
        self.usable: bool | None = None  # None: not tried yet
        self._forget()

    def _forget(self) -> None:
        self.parts: list[list[Tensor]] = []  # each the outputs of some rows
        self.places: dict[bytes, tuple[int, int]] = {}  # key -> part, row
        self.bytes = self.strangers = 0

    def forward(self, inputs: Any) -> list[Tensor]:
        """The flat outputs [rows, ...] of all rows of a batch."""
        rows = _rows(inputs) if self.usable is not False else []
        if self.usable is None and len(rows) > 1:
            self.usable = self._rows_stand_alone(inputs, len(rows))
        if not self.usable or not rows:
            return self.ask(inputs)
        first: dict[bytes, int] = {}
        for number, key in enumerate(rows):
            if key not in self.places:
                first.setdefault(key, number)
        new = list(first.values())
        fresh = self.ask(batch_of(inputs, new)) if new else []
        found = self._assembled(rows, {rows[number]: place for place, number in enumerate(new)}, fresh)
        self._keep([rows[number] for number in new], fresh, len(rows))
        return found

    def ask(self, inputs: Any) -> list[Tensor]:
        """The flat outputs, computed; nothing is kept."""
        with torch.no_grad():
            return [torch.as_tensor(leaf) for leaf in flatten(self.predict(inputs))[0]]

    def _rows_stand_alone(self, inputs: Any, count: int) -> bool:
        some = [count - 1, 0] if count > 2 else [1]
        whole, part = self.ask(inputs), self.ask(batch_of(inputs, some))
        for one, two in zip(whole, part, strict=True):
            if one.shape[:1] != (count,) or two.shape != (len(some), *one.shape[1:]):
                return False
            if not torch.allclose(one[some].double(), two.double(), rtol=0, atol=TOLERANCE * float(_largest(one)), equal_nan=True):
                return False
        return True

    def _assembled(self, rows: Sequence[bytes], new: dict[bytes, int], fresh: list[Tensor]) -> list[Tensor]:
        taken = [(fresh, new[key]) if key in new else (self.parts[self.places[key][0]], self.places[key][1]) for key in rows]
        return [torch.stack([part[leaf][place] for part, place in taken]) for leaf in range(len(taken[0][0]))]

    def _keep(self, keys: list[bytes], fresh: list[Tensor], seen: int) -> None:
        self.strangers = self.strangers + seen if len(keys) == seen else 0
        size = sum(leaf.numel() * leaf.element_size() for leaf in fresh) + OVERHEAD * len(keys)
        if keys and self.bytes + size <= self.limit:
            self.places |= {key: (len(self.parts), row) for row, key in enumerate(keys)}
            self.parts.append(fresh)
            self.bytes += size
        elif self.strangers > PATIENCE * max(len(self.places), 1):
            self._forget()
            self.usable = False

    # State, for checkpoints ----------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """All that is kept, as the bytes of a safetensors file."""
        tensors = {f"{number}.{leaf}": value.contiguous() for number, part in enumerate(self.parts) for leaf, value in enumerate(part)}
        keys = b"".join(self.places)
        tensors["keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8) if keys else torch.zeros(0, dtype=torch.uint8)
        tensors["facts"] = torch.tensor([-1 if self.usable is None else int(self.usable), self.strangers, self.bytes])
        return torch.frombuffer(bytearray(safetensors.torch.save(tensors)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`."""
        tensors = safetensors.torch.load(state.cpu().numpy().tobytes())
        keys = tensors.pop("keys").numpy().tobytes()
        usable, self.strangers, self.bytes = tensors.pop("facts").tolist()
        self.usable = None if usable < 0 else bool(usable)
        parts: dict[int, dict[int, Tensor]] = {}
        for name, value in tensors.items():
            number, leaf = map(int, name.split("."))
            parts.setdefault(number, {})[leaf] = value
        self.parts = [[parts[number][leaf] for leaf in sorted(parts[number])] for number in sorted(parts)]
        places = [(number, row) for number, part in enumerate(self.parts) for row in range(len(part[0]))]
        self.places = {keys[i * DIGEST : (i + 1) * DIGEST]: place for i, place in enumerate(places)}


def tensors_in(inputs: Any) -> Any:
    """The inputs with torch tensors in the place of other arrays."""
    leaves, structure = flatten(inputs)
    return unflatten(structure, [torch.as_tensor(leaf) for leaf in leaves])


def _rows(inputs: Any) -> list[bytes]:
    """A key for each row; none where a tensor has not the batch first."""
    leaves = [leaf for leaf in flatten(inputs)[0] if looks_like_tensor(leaf)]
    count = leaves[0].shape[0] if leaves and leaves[0].dim() else 0
    if any(not isinstance(leaf, Tensor) or leaf.shape[:1] != (count,) for leaf in leaves):
        return []
    digests = [hashlib.blake2b(digest_size=DIGEST) for _ in range(count)]
    for leaf in leaves:
        form = f"{leaf.dtype} {list(leaf.shape[1:])} ".encode()
        for digest, row in zip(digests, leaf.detach().cpu().contiguous(), strict=True):
            digest.update(form)
            digest.update(row.reshape(-1).view(torch.uint8).numpy())
    return [digest.digest() for digest in digests]


def _largest(value: Tensor) -> Tensor:
    return torch.where(value.isfinite(), value.abs(), torch.zeros_like(value)).amax() if value.numel() else torch.zeros(())
