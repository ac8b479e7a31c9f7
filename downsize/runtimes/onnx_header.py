"""What an ONNX file says of its inputs and outputs, read without the onnx package and without touching the weights.

An ONNX file is one protobuf message (the field numbers below are those of onnx.proto). Only the outermost fields are walked and
everything else is stepped over, so that a large file is read in milliseconds, a damaged one is refused before any runtime sees it,
and the memory of a process that only runs the file is not inflated by a second copy of the model.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError

# TensorProto.DataType -> numpy's name. The types left out (text, bfloat16, 8-bit floats, 4-bit integers) have no numpy array.
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128",
}  # fmt: skip
Span = tuple[int, int]


@dataclass(frozen=True)
class Slot:
    """One input or output: its name, numpy dtype, and shape (numbers, or a text symbol where the size may vary; None: any rank)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else ", ".join(map(str, self.shape))
        return f"{self.name}: {self.dtype}[{shape}]"


@dataclass(frozen=True)
class Header:
    """The inputs and outputs of an ONNX file in graph order, its metadata, and the files beside it that hold some of its weights."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    metadata: dict[str, str]
    side_files: tuple[Path, ...]


def read_header(path: str | Path) -> Header:
    """The header of the ONNX file at ``path``.

    Raises:
        ArtifactError: there is no such file, it is not ONNX or is damaged, or an input is not a plain tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}; expected an ONNX file: check the path.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(data, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is not an ONNX file or is damaged ({error}): write or copy it again.") from error


def _header(data: mmap.mmap, path: Path) -> Header:
    metadata: dict[str, str] = {}
    inputs: list[Slot] = []
    outputs: list[Slot] = []
    initializers: set[str] = set()
    side_files: dict[Path, None] = {}
    for field, span in _messages(data, (0, len(data))):
        if field == 14:  # metadata_props
            entry = _texts(data, span, (1, 2))
            metadata[entry[1]] = entry[2]
        if field == 7:  # graph
            for part, inner in _messages(data, span):
                if part == 5:  # initializer
                    name, location = _tensor(data, inner)
                    initializers.add(name)
                    if location:
                        side_files[path.parent / location] = None
                elif part == 15:  # sparse_initializer: named by its values
                    initializers.update(_tensor(data, values)[0] for tag, values in _messages(data, inner) if tag == 1)
                elif part in (11, 12):
                    (inputs if part == 11 else outputs).append(_slot(data, inner))
    if not outputs:
        raise ValueError("no graph with outputs was found in it")
    # Files of old versions list the weights among the inputs.
    return Header(tuple(slot for slot in inputs if slot.name not in initializers), tuple(outputs), metadata, tuple(side_files))


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"the number at byte {at} has no end")


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """The fields of the message in ``span``: a number, or the span of a nested message, text or bytes."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, end)
            yield field, value
            continue
        if wire == 2:
            length, at = _varint(data, at, end)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if field == 0 or at + length > end:
            raise ValueError(f"a field at byte {at} reaches past its end")
        if wire == 2:
            yield field, (at, at + length)
        at += length


def _messages(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    for field, value in _fields(data, span):
        if isinstance(value, tuple):
            yield field, value


def _text(data: mmap.mmap, span: Span) -> str:
    return data[span[0] : span[1]].decode("utf-8")


def _texts(data: mmap.mmap, span: Span, wanted: tuple[int, ...]) -> dict[int, str]:
    found = dict.fromkeys(wanted, "")
    found.update({field: _text(data, part) for field, part in _messages(data, span) if field in wanted})
    return found


def _tensor(data: mmap.mmap, span: Span) -> tuple[str, str]:
    """A TensorProto's name, and the file its values lie in ("" when they lie in the message)."""
    name, location = "", ""
    for field, part in _messages(data, span):
        if field == 8:
            name = _text(data, part)
        elif field == 13:  # external_data: key and value
            entry = _texts(data, part, (1, 2))
            location = entry[2] if entry[1] == "location" else location
    return name, location


def _slot(data: mmap.mmap, span: Span) -> Slot:
    """A ValueInfoProto."""
    name = _texts(data, span, (1,))[1]
    kinds = [kind for field, part in _messages(data, span) if field == 2 for kind in _messages(data, part)]
    if [field for field, _ in kinds if field != 6] != [1]:  # 1: tensor_type; 6: a note on the meaning
        raise ArtifactError(f"{name!r} is not a plain tensor (a sequence, map, sparse or optional value); export the model with tensors only.")
    dtype, shape = 0, None
    for field, value in _fields(data, next(part for field, part in kinds if field == 1)):
        if field == 1 and isinstance(value, int):
            dtype = value
        elif field == 2 and isinstance(value, tuple):
            shape = tuple(_dimension(data, part) for tag, part in _messages(data, value) if tag == 1)
    return Slot(name, DTYPES.get(dtype, f"onnx type {dtype}"), shape)


def _dimension(data: mmap.mmap, span: Span) -> int | str:
    for field, value in _fields(data, span):
        if field == 1 and isinstance(value, int) and 0 < value < 2**63:  # some writers put 0 or -1 where the size may vary
            return value
        if field == 2 and isinstance(value, tuple) and value[1] > value[0]:
            return _text(data, value)
    return "?"
