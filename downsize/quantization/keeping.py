"""Weights that stay in float, and the inputs of their layers with them."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from ..errors import SpecError, nearest
from .placement import MOVES, WEIGHT_LAYERS, Placement, Point, end_of, is_transparent


def without(placement: Placement, patterns: Sequence[str]) -> Placement:
    """The placement without the weights that a pattern names, or whose module it names; ``*`` stands for anything.

    The layers that read them get their inputs in float: a quantized input would make runtimes round their weights, too.

    Raises:
        SpecError: a pattern names no weight; or such a layer shares a padded input with one that is quantized.
    """
    if not patterns:
        return placement
    names = [str(point.node.target) for point in placement.weights]
    for pattern in patterns:
        if not any(is_named(name, [pattern]) for name in names):
            raise SpecError(f"quantize: keep={pattern!r} names none of the weights; {nearest(pattern, names)}")
    kept = {point.node for point in placement.weights if is_named(str(point.node.target), patterns)}
    layers = [layer for layer in placement.layers if layer.args[WEIGHT_LAYERS[layer.target][1]] in kept]
    rest = [layer for layer in placement.layers if layer not in layers]
    points = {point.node: point for point in placement.activations}
    for layer in layers:
        _free_input(layer, points, layers)
    for layer in layers:
        end = end_of(layer)
        if end in points and not any(user in rest or user in points or end_of(user) in points for user in end.users):
            del points[end]  # nothing that computes in integers reads it
    weights = [point for point in placement.weights if point.node not in kept]
    left = placement.left | {layer.name: "kept in float, as was asked" for layer in layers}
    return replace(placement, activations=list(points.values()), weights=weights, layers=rest, left=left)


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is that of a weight or of a module that it is in; ``*`` stands for anything."""
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _free_input(layer: fx.Node, points: dict[fx.Node, Point], layers: Collection[fx.Node]) -> None:
    """Let a layer read its input as it was before the quantizer; one that nothing else reads goes."""
    reader, source = layer, layer.args[WEIGHT_LAYERS[layer.target][0]]
    while isinstance(source, fx.Node) and (source in points or is_transparent(source)):
        if source in points:
            readers = points[source].readers or tuple(source.users)
            others = tuple(one for one in readers if one is not reader)
            if others:
                points[source] = replace(points[source], readers=others)
                return
            del points[source]
            if source.target not in MOVES:
                return
        elif shared := [user for user in source.users if user is not reader and user not in layers]:
            raise SpecError(f"quantize: keep: {layer.name} and {shared[0].name} share their padded input {source.name}; keep both or none.")
        reader, source = source, source.args[0]
