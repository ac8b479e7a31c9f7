"""Batches and outputs kept on disk, so that judging a model does not need memory for its data. numpy only."""

from __future__ import annotations

import math
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import MeasureError
from .structure import is_named, looks_like_tensor

SMALL = 1 << 14  # tensors of at most this many bytes stay in memory
ALIGNMENT = 64


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tuples, lists and dicts with ``function`` of each leaf."""
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [tree_map(function, item) for item in tree]
        return items if isinstance(tree, list) else type(tree)(*items) if is_named(tree) else tuple(items)
    return function(tree)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file. ``torch``: it was a torch tensor and becomes one again."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    torch: bool

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def tensor(self, memory: np.ndarray) -> Any:
        """The tensor over ``memory``, its bytes."""
        array = memory.view(self.dtype).reshape(self.shape)
        return sys.modules["torch"].from_numpy(array) if self.torch else array


class Spool:
    """A list of trees of tensors, written once to a temporary file that goes away with the object. Tensors are copied when appended.

    Reading gives what was written, in structure, values and kind of tensor; leaves that are no tensors are kept by reference.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as the spool)
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._trees: list[Any] = []

    def __len__(self) -> int:
        return len(self._trees)

    def append(self, tree: Any) -> None:
        """Write a tree.

        Raises:
            MeasureError: the temporary folder is full.
        """
        self._trees.append(tree_map(self._put, tree))

    def read(self, number: int) -> Any:
        """Tree ``number``, in memory."""
        return tree_map(self._get, self._trees[number])

    def views(self) -> list[Any]:
        """All trees so far, over the file: a tensor takes memory only when its values are looked at. Writing to one changes no file."""
        self._file.truncate(self._end)
        mapped = np.memmap(self._file, dtype=np.uint8, mode="c") if self._end else np.empty(0, np.uint8)
        memory = mapped.view(np.ndarray)

        def view(leaf: Any) -> Any:
            return leaf.tensor(memory[leaf.offset : leaf.offset + leaf.bytes]) if isinstance(leaf, _Stored) else leaf

        return [tree_map(view, tree) for tree in self._trees]

    def _put(self, leaf: Any) -> Any:
        if not looks_like_tensor(leaf):
            return leaf
        torch = hasattr(leaf, "detach")
        array = np.asarray(leaf) if not torch else _numpy_of(leaf)
        if array is None:
            return leaf.detach().clone()
        if array.nbytes <= SMALL or array.dtype.hasobject:
            return leaf.detach().clone() if torch else array.copy()
        stored = _Stored(self._end, array.dtype, array.shape, torch)
        self._write(np.ascontiguousarray(array))
        return stored

    def _write(self, array: np.ndarray) -> None:
        rest = array.data.cast("B")
        try:
            self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise MeasureError(
                f"the data to judge on cannot be kept in {tempfile.gettempdir()!r}: {error.strerror}; free space there, or set TMPDIR."
            ) from error
        self._end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT

    def _get(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Stored):
            return leaf
        memory = np.empty(leaf.bytes, np.uint8)
        self._file.seek(leaf.offset)
        if self._file.readinto(memory.data) != leaf.bytes:
            raise MeasureError(f"the temporary file in {tempfile.gettempdir()!r} was cut short while it was in use.")
        return leaf.tensor(memory)


def _numpy_of(tensor: Any) -> np.ndarray | None:
    """A torch tensor as numpy; None for element types that numpy does not have."""
    try:
        return tensor.detach().numpy()
    except TypeError:
        return None
