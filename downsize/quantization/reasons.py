"""Why a weight or an input suffers from few bits, decided by measured numbers, and what would mend it."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import aten
from ..network.statistics import walk
from .correction import channel_axis
from .placement import WeightPoint

LARGE = 0.01  # of the outputs, squared: what asks for a reason
# A row of normal random weights has its largest at about 3 to 4 of their root mean square.
FAR = 6.0
FEW = 16  # weights a row
WORTH = 0.5  # a mend leaves at most this part of the error
UNEVEN = 8.0  # the largest channel's range over the median's


def of_weight(
    network: Network, point: WeightPoint, loss: Mapping[int, float], output: Mapping[int, float], bits: int, mended: Mapping[str, float], place: str
) -> str:
    """Why the outputs lose much with so many bits of this weight; ``mended``: the layer's error by what would be done; ``place``: first, last."""
    weight = network.tensor(str(point.node.target)).detach()
    rows = weight.reshape(1, -1) if point.axis is None else weight.transpose(0, point.axis).flatten(1)
    far = float(_farness(rows).median())
    own, grown = output[bits], loss[bits] / max(output[bits], 1e-30)
    if rows.shape[1] <= FEW:
        why = f"a row has only {rows.shape[1]} weights, whose errors do not average out"
    elif far > FAR:
        why = f"the largest weight of a row is {far:.0f} times their root mean square"
    elif place == "last":
        why = "its outputs are the network's"
    elif grown > 2:
        why = f"the layers behind it make {grown:.1f} times as much of its error"
    elif place == "first":
        why = "all layers read what it gives"
    else:
        why = f"its weights are even (the largest of a row is {far:.1f} times their root mean square): it needs the bits"
    return f"at {bits} bits the outputs lose {loss[bits]:.2g}, the layer {own:.2g}: {why}; {_mend(loss, own, bits, mended)}"


def _farness(rows: Tensor) -> Tensor:
    """Of each row that is not zero, its largest magnitude over its root mean square."""
    size = rows.square().mean(1).sqrt()
    known = size > 0
    return rows.abs().amax(1)[known] / size[known] if bool(known.any()) else torch.ones(1)


def _mend(loss: Mapping[int, float], own: float, bits: int, mended: Mapping[str, float]) -> str:
    best = min(mended, key=mended.__getitem__, default=None)
    wider = min((each for each in loss if each > bits), default=None)
    told = []
    if best is not None and mended[best] <= WORTH * own:
        told.append(f"{best} leaves the layer {mended[best]:.2g}")
    if wider is not None:
        told.append(f"{wider} bits lose {loss[wider]:.2g}")
    if len(told) < 2:
        told.append("train=True adapts it")
    return ", ".join(told)


def of_input(network: Network, layer: fx.Node, source: fx.Node, pieces: Iterable[list[Tensor]], full: float, clipped: float) -> str:
    """Why the outputs lose much when a layer's input has 8 bits on its ``full`` range; ``clipped``: on that of least squared error."""
    said = f"its input at 8 bits loses {full:.2g}"
    if clipped <= WORTH * full:
        return f"{said}: rare values set the range; clipped for least squared error it loses {clipped:.2g} (ranges=['mse', 'percentile'])"
    uneven = _unevenness(network, layer, source, pieces)
    if uneven > UNEVEN and layer.target is aten.linear.default:
        return f"{said}: the range of its widest channel is {uneven:.0f} times the median's; smooth=True moves that into the weight"
    if uneven > UNEVEN:
        return f"{said}: the range of its widest channel is {uneven:.0f} times the median's; equalize=True evens it out where the layer before allows"
    return f"{said}, clipped {clipped:.2g}, and no channel stands out ({uneven:.1f} times the median): keep this layer in float"


def _unevenness(network: Network, layer: fx.Node, source: fx.Node, pieces: Iterable[list[Tensor]]) -> float:
    """Of a layer's input, the largest magnitude of the widest channel over that of the median channel."""
    peaks: list[Tensor] = []

    def record(args: tuple[object, ...], value: Tensor) -> None:
        peaks.append(value.abs().transpose(0, channel_axis(layer, value)).flatten(1).amax(1))

    for leaves in pieces:
        walk(network, leaves, {source: record})
    peak = torch.stack(peaks).amax(0)
    return float(peak.max() / peak.median().clamp(min=1e-30))
