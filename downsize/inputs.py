"""What the inputs of a model's call look like, by path, and whether other inputs are of the same kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import TaskError
from .numerics.agreement import as_array, count_not_finite
from .structure import CONSTANTS, as_call, looks_like_tensor


def named(inputs: Any) -> dict[str, Any]:
    """The leaves of a call's inputs by path, e.g. ``inputs[0]``; a single tensor and a tuple of one are the same call."""
    args, kwargs = as_call(inputs)
    return dict([*_named(args, "inputs"), *_named(kwargs, "inputs")])


def _named(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _named(value, f"{path}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from _named(value, f"{path}[{i}]")
    else:
        yield path, tree


def tensors_like(example: Any, inputs: Any) -> list[Any]:
    """The tensors of ``inputs`` in the order of ``example``; dict keys may come in another order."""
    leaves = named(inputs)
    return [leaves[path] for path, leaf in named(example).items() if looks_like_tensor(leaf)]


def same(one: Any, other: Any) -> bool:
    """Whether two calls have the same inputs, value by value."""
    left, right = named(one), named(other)
    if set(left) != set(right):
        return False
    pairs = [(leaf, right[path]) for path, leaf in left.items()]
    return all(bool((as_array(a).shape == as_array(b).shape) and (as_array(a) == as_array(b)).all()) for a, b in pairs)


def describe(inputs: Any) -> str:
    """Inputs as text, e.g. ``inputs[0] float32 [8, 3, 224, 224]``."""
    return ", ".join(f"{path} {_kind(leaf)}" for path, leaf in named(inputs).items()) or "no inputs"


def _kind(leaf: Any) -> str:
    if looks_like_tensor(leaf):
        return f"{dtype(leaf)} {list(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, CONSTANTS) else f"a {type(leaf).__name__}"


def _supported(leaf: Any) -> bool:
    return looks_like_tensor(leaf) or isinstance(leaf, CONSTANTS)


def dtype(tensor: Any) -> str:
    """The element type under numpy's name, e.g. ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def refuse_unlike(example: Any, inputs: Any, where: str) -> None:
    """Refuse inputs that differ from ``example`` in more than their sizes; ``where`` says whose they are.

    Raises:
        TaskError: they differ in structure, element type, number of dimensions or a constant, or a dimension is empty.
    """
    wanted, came = named(example), named(inputs)
    if set(wanted) != set(came):
        raise TaskError(f"{where} has {describe(inputs)}; expected {describe(example)}, as in the example.")
    for path, leaf in came.items():
        other = wanted[path]
        if not _supported(leaf):
            raise TaskError(f"{where}: {path} is {_kind(leaf)}; expected tensors, numbers, text or None.")
        if not looks_like_tensor(other):
            if looks_like_tensor(leaf) or leaf != other:
                raise TaskError(f"{where}: {path} is {_kind(leaf)}; expected {other!r}, as in the example.")
        elif not looks_like_tensor(leaf) or dtype(leaf) != dtype(other) or len(leaf.shape) != len(other.shape):
            raise TaskError(
                f"{where}: {path} is {_kind(leaf)}; expected {dtype(other)} with {len(other.shape)} dimensions, like the example's "
                f"{list(other.shape)}: convert the data, or give an example like it."
            )
        elif 0 in leaf.shape:
            raise TaskError(f"{where}: {path} is {_kind(leaf)}; expected at least one sample and no empty dimension.")


def refuse_not_finite(inputs: Any, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        TaskError: a float tensor among the inputs has such values.
    """
    for path, leaf in named(inputs).items():
        if looks_like_tensor(leaf) and (bad := count_not_finite(leaf)):
            raise TaskError(f"{where}: {path} has {bad} values that are NaN or infinite; expected finite numbers.")
