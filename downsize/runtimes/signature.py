"""How a model file is called: the names, shapes and dtypes of its inputs, and the structure of inputs and outputs.

Everything that can be wrong with inputs is found here, before a runtime sees them, in the same words for every runtime.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..structure import Structure, as_call, flatten, looks_like_tensor, select, unflatten
from .onnx_header import DTYPES, Header, Slot, read_header

METADATA_KEY = "downsize.io"
VERSION = 1
PRECISIONS = ("", "bf16", "f16")


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one model file.

    ``call`` is the structure of ``[list of positional arguments, dict of keyword arguments]`` and ``result`` that of the outputs; both
    are None for an ONNX file of another maker, whose inputs go by name or in graph order. ``precision``: "bf16" or "f16" where the file says
    that it is to be computed in 16 bits, else "".
    """

    path: str
    inputs: tuple[Slot, ...]
    output_names: tuple[str, ...]
    call: Structure | None = None
    result: Structure | None = None
    precision: str = ""

    @classmethod
    def read(cls, path: str | Path) -> Signature:
        """The signature of the ONNX file at ``path``; nothing but its header is read.

        Raises:
            ArtifactError: the file is missing, damaged or not ONNX, its metadata contradict its graph, or an input type has no array.
        """
        header = read_header(path)
        odd = [str(slot) for slot in header.inputs if slot.dtype not in DTYPES.values()]
        if odd:
            raise ArtifactError(f"{path} has inputs of a type that numpy has no array for: {odd}; export it with {sorted(DTYPES.values())}.")
        missing = [str(side) for side in header.side_files if not side.is_file()]
        if missing:
            raise ArtifactError(f"{path} keeps weights in {missing}, which are not there: put them beside it.")
        text = header.metadata.get(METADATA_KEY)
        if text is None:
            return cls(str(path), header.inputs, tuple(slot.name for slot in header.outputs))
        try:
            return cls(str(path), *_from_metadata(json.loads(text), header))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{path} has damaged metadata {METADATA_KEY!r} ({error!r}): export it again.") from error

    def arrays(self, inputs: Any) -> list[np.ndarray]:
        """The arrays that the file wants, in graph order, from ``inputs`` given as the original model was called.

        ``inputs`` is a tensor, a tuple or list (positions), or a dict (keywords, or the file's own input names). Tensors may be numpy
        arrays or torch tensors. A dtype is widened when no value can change (int32 -> int64), and refused otherwise.

        Raises:
            ArtifactError: an input is missing or too much, or has the wrong dtype, rank or size.
        """
        try:
            leaves = self._leaves(inputs)
            arrays = [_array(slot, leaf) for slot, leaf in zip(self.inputs, leaves, strict=True)]
            self._check_sizes(arrays)
        except ArtifactError as error:
            raise ArtifactError(f"{error} {Path(self.path).name} takes ({', '.join(map(str, self.inputs))}).") from error
        return arrays

    def outputs(self, arrays: list[np.ndarray], inputs: Any) -> Any:
        """``arrays`` in the structure of the original model's outputs; torch tensors when there are torch tensors among ``inputs``."""
        leaves: list[Any] = arrays
        if any(hasattr(leaf, "detach") for leaf in flatten(inputs)[0]):
            torch = sys.modules["torch"]  # it is there: the inputs came from it
            leaves = [torch.from_numpy(array) for array in arrays]
        if self.result is not None:
            return unflatten(self.result, leaves)
        return leaves[0] if len(leaves) == 1 else dict(zip(self.output_names, leaves, strict=True))

    def _leaves(self, inputs: Any) -> list[Any]:
        names = [slot.name for slot in self.inputs]
        if isinstance(inputs, Mapping) and set(inputs) == set(names) and all(map(looks_like_tensor, inputs.values())):
            return [inputs[name] for name in names]
        args, keywords = as_call(inputs)
        if self.call is not None:
            positions, words = self.call["items"]
            # An empty half matches anything empty, so that the message is about the half that was used.
            halves = [(positions, args), (words, keywords)] if args or positions["items"] else [(words, keywords)]
            return [leaf for structure, tree in halves for leaf in select(structure, tree)]
        if keywords or not all(map(looks_like_tensor, args)) or len(args) != len(names):
            got = sorted(keywords) if keywords else [type(arg).__name__ for arg in args]
            raise ArtifactError(f"The inputs are {got}; expected {len(names)} tensor(s), in order or by name.")
        return list(args)

    def _check_sizes(self, arrays: list[np.ndarray]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for slot, array in zip(self.inputs, arrays, strict=True):
            if slot.shape is None:
                continue
            if array.ndim != len(slot.shape):
                raise ArtifactError(f"Input {slot.name!r} has shape {array.shape}; expected {len(slot.shape)} dimensions.")
            for axis, (want, got) in enumerate(zip(slot.shape, array.shape, strict=True)):
                if got == 0:
                    raise ArtifactError(f"Input {slot.name!r} has shape {array.shape}: it is empty; give at least one sample.")
                if isinstance(want, int) and got != want:
                    raise ArtifactError(f"Input {slot.name!r} has shape {array.shape}; expected {want} in dimension {axis}.")
                if isinstance(want, str) and want != "?" and sizes.setdefault(want, (got, slot.name))[0] != got:
                    size, first = sizes[want]
                    raise ArtifactError(f"Input {slot.name!r} has {want} = {got} in dimension {axis}, but {first!r} has {want} = {size}.")


def as_array(leaf: Any) -> np.ndarray:
    """A tensor of any library as a numpy array; torch tensors are detached and brought to the CPU.

    Raises:
        ArtifactError: numpy has no array for it (a bfloat16 tensor, Python objects).
    """
    try:
        leaf = leaf.detach().cpu().numpy() if hasattr(leaf, "detach") else leaf
        array = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"A {type(leaf).__name__} of dtype {leaf.dtype} has no numpy array ({error}); convert it to float32 first.") from error
    if array.dtype.name not in DTYPES.values():
        raise ArtifactError(f"An array of dtype {array.dtype} cannot be given to a model; expected one of {sorted(DTYPES.values())}.")
    return array


def _array(slot: Slot, leaf: Any) -> np.ndarray:
    array = as_array(leaf)
    if not _lossless(array.dtype, np.dtype(slot.dtype)):
        raise ArtifactError(
            f"Input {slot.name!r} has dtype {array.dtype}; expected {slot.dtype}, and the change could alter values: "
            f"convert it yourself (numpy: .astype('{slot.dtype}'))."
        )
    return np.asarray(array, dtype=slot.dtype, order="C")


def _lossless(given: np.dtype, wanted: np.dtype) -> bool:
    """Whether every value survives; numpy's "safe" lets 64-bit integers become floats, which rounds those above 2^53."""
    return np.can_cast(given, wanted, "safe") and not (given.kind in "iu" and given.itemsize == 8 and wanted.kind in "fc")


def _from_metadata(said: dict[str, Any], header: Header) -> tuple[tuple[Slot, ...], tuple[str, ...], Structure, Structure, str]:
    if said["version"] != VERSION:
        raise ValueError(f"version {said['version']}, expected {VERSION}")
    slots = {slot.name: slot for slot in header.inputs}
    names, output_names = list(said["input_names"]), list(said["output_names"])
    if sorted(names) != sorted(slots):
        raise ValueError(f"inputs {names}, but the graph has {sorted(slots)}")
    if not set(output_names) <= {slot.name for slot in header.outputs}:
        raise ValueError(f"outputs {output_names}, but the graph has {[slot.name for slot in header.outputs]}")
    call, result = said["inputs"], said["outputs"]
    counts = (_count_tensors(call), _count_tensors(result))
    if counts != (len(names), len(output_names)):
        raise ValueError(f"structures with {counts} tensors for {len(names)} inputs and {len(output_names)} outputs")
    if [item["kind"] for item in call["items"]] not in (["tuple", "dict"], ["list", "dict"]):
        raise ValueError("the inputs are not [arguments, keywords]")
    if (precision := said.get("precision", "")) not in PRECISIONS:
        raise ValueError(f"precision {precision!r}, expected one of {PRECISIONS}")
    return tuple(slots[name] for name in names), tuple(output_names), call, result, precision


def _count_tensors(node: Structure) -> int:
    """The number of tensors in a structure.

    Raises:
        ValueError, KeyError, TypeError: it is not a structure.
    """
    kind = node["kind"]
    if kind == "tensor":
        return 1
    if kind == "constant" and isinstance(node["value"], (bool, int, float, str, type(None))):
        return 0
    named = kind in ("dict", "named")
    if not (named or kind in ("tuple", "list")) or (named and len(set(node["keys"])) != len(node["items"])):
        raise ValueError(f"unknown structure {kind!r}")
    return sum(map(_count_tensors, node["items"]))
