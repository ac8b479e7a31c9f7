"""The structure of a model's inputs and outputs: which tuples and dicts hold which tensors.

A *structure* is plain JSON, so that it travels in a saved Network and in the metadata of a model file, and a runtime can give back
outputs in the shape the original model gave them, without importing torch:

    {"kind": "tensor"}  ·  {"kind": "constant", "value": 3}  ·  {"kind": "tuple" | "list", "items": [...]}
    {"kind": "dict" | "named", "keys": [...], "items": [...]}

"named" is a tuple whose items have names too (NamedTuple, namedtuple); its own class stays with the model.

>>> leaves, structure = flatten({"a": 1, "b": (None, 2.5)}, is_tensor=lambda leaf: isinstance(leaf, float))
>>> leaves
[2.5]
>>> unflatten(structure, ["x"])
{'a': 1, 'b': (None, 'x')}
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import ArtifactError

Structure = dict[str, Any]
CONSTANTS = (bool, int, float, str, type(None))


def looks_like_tensor(leaf: object) -> bool:
    """Whether a leaf is an array of any library (numpy, torch): it has a shape and a dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_named(value: object) -> bool:
    """Whether a value is a tuple whose items have names."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


@functools.cache
def _named(keys: tuple[str, ...]) -> Any:
    # ``rename``: names from a file of anywhere may be none.
    return collections.namedtuple("Outputs", keys, rename=True)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch's inputs are given to a model: a dict as keywords, a tuple or list as positions, a single tensor as one position."""
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def flatten(tree: Any, is_tensor: Callable[[object], bool] = looks_like_tensor) -> tuple[list[Any], Structure]:
    """The tensors of ``tree`` in order, and its structure.

    Raises:
        ArtifactError: a leaf is neither a tensor nor one of bool, int, float, str, None.
    """
    leaves: list[Any] = []

    def visit(node: Any, path: str) -> Structure:
        if is_tensor(node):
            leaves.append(node)
            return {"kind": "tensor"}
        if isinstance(node, Mapping):
            keys = list(node)
            if not all(isinstance(key, str) for key in keys):
                raise ArtifactError(f"{path or 'the value'} is a dict with keys {keys}; only text keys can be saved: rename them.")
            return {"kind": "dict", "keys": keys, "items": [visit(node[key], f"{path}[{key!r}]") for key in keys]}
        if is_named(node):
            return {"kind": "named", "keys": list(node._fields), "items": [visit(getattr(node, key), f"{path}.{key}") for key in node._fields]}
        if isinstance(node, (tuple, list)):
            kind = "list" if isinstance(node, list) else "tuple"
            return {"kind": kind, "items": [visit(item, f"{path}[{i}]") for i, item in enumerate(node)]}
        if isinstance(node, CONSTANTS):
            return {"kind": "constant", "value": node}
        raise ArtifactError(
            f"{path or 'the value'} is a {type(node).__name__}; expected tensors, numbers, text, None, and tuples, lists or dicts "
            "of them: wrap the model in a module that takes and returns those."
        )

    return leaves, visit(tree, "")


def unflatten(structure: Structure, leaves: list[Any]) -> Any:
    """The inverse of :func:`flatten`: put ``leaves`` back into their places."""
    rest = iter(leaves)

    def build(node: Structure) -> Any:
        kind = node["kind"]
        if kind == "tensor":
            return next(rest)
        if kind == "constant":
            return node["value"]
        items = [build(item) for item in node["items"]]
        if kind == "dict":
            return dict(zip(node["keys"], items, strict=True))
        if kind == "named":
            return _named(tuple(node["keys"]))(*items)
        return tuple(items) if kind == "tuple" else items

    return build(structure)


def select(structure: Structure, tree: Any) -> list[Any]:
    """The tensors of ``tree`` in the order ``structure`` wants them; keys may come in another order.

    Raises:
        ArtifactError: something is missing, too much, or a constant differs from the one the model was captured with.
    """
    return list(_select(structure, tree, "inputs"))


def _select(node: Structure, value: Any, path: str) -> Iterator[Any]:
    kind = node["kind"]
    if kind == "tensor":
        if not looks_like_tensor(value):
            raise ArtifactError(f"{path} is a {type(value).__name__}; expected a tensor.")
        yield value
    elif kind == "constant":
        if looks_like_tensor(value) or value != node["value"] or type(value) is not type(node["value"]):
            got = "a tensor" if looks_like_tensor(value) else repr(value)
            raise ArtifactError(
                f"{path} is {got}; the model was captured with the constant {node['value']!r} there: capture it again with an example like yours."
            )
    elif kind == "dict":
        if not isinstance(value, Mapping) or set(value) != set(node["keys"]):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ArtifactError(f"{path} has {got}; expected the keys {sorted(node['keys'])}.")
        for key, item in zip(node["keys"], node["items"], strict=True):
            yield from _select(item, value[key], f"{path}[{key!r}]")
    else:
        if not isinstance(value, (tuple, list)) or len(value) != len(node["items"]):
            got = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
            raise ArtifactError(f"{path} has {got}; expected {len(node['items'])}.")
        for i, (item, part) in enumerate(zip(node["items"], value, strict=True)):
            yield from _select(item, part, f"{path}[{i}]")
