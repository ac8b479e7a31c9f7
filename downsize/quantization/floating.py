"""Networks in which some weights stay in float, made again and again while it is chosen which."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence

from ..errors import SpecError
from ..network.network import Network
from ..network.statistics import Pieces, distributions
from ..progress import Progress
from .bits import FLOAT
from .building import Build
from .choosing import plain_ranges
from .insertion import settle
from .keeping import without
from .mixed import MEASURING_PIECES, SOLVING_PIECES, spread
from .placement import WEIGHT_LAYERS, Placement
from .sensitivities import input_losses
from .weight_only import Data


class Shells:
    """What a network will be when some of its weights stay in float, with their layers' inputs; ranges are full ones, measured once.

    Args: ``fit``: what ranges are measured on.
    """

    def __init__(self, network: Network, placement: Placement, build: Build, fit: Pieces) -> None:
        self.network, self.placement, self.build = network, placement, build
        self.ranges = plain_ranges(network, placement, build.counts, fit) if placement.activations else {}

    def __call__(self, kept: Collection[str]) -> Network:
        """To run: quantized activations, all weights in float."""
        return settle(self.build(self.network, without(self.placement, _patterns(kept)), self.ranges, None))

    def rounded(self, kept: Collection[str]) -> Network:
        """To be written: with the other weights rounded to nearest at the bits of the build."""
        return self.build(self.network, without(self.placement, _patterns(kept)), self.ranges, {})

    def spared(self, names: Sequence[str], data: Data, progress: Progress | None = None) -> dict[str, float]:
        """Of each weight that may stay in float, the loss of the outputs when the inputs of its layers alone are rounded, on their full range."""
        found = {name: 0.0 for name in names if self.may_stay(name)}
        if not self.ranges:
            return found
        bits = {layer: count for layer, count in self.build.counts.of_inputs(self.network, self.placement).items() if count != FLOAT}
        sources = [layer.args[WEIGHT_LAYERS[layer.target][0]] for layer in bits]
        known = distributions(self.network, spread(data.fit, SOLVING_PIECES), dict.fromkeys(sources))
        widths = sorted(set(bits.values()))
        losses = input_losses(self.network, bits, spread(data.held, MEASURING_PIECES), known, widths, progress=progress)
        for layer, count in bits.items():
            name = str(layer.args[WEIGHT_LAYERS[layer.target][1]].target)
            if name in found:
                found[name] += losses[layer.name][count]
        return found

    def may_stay(self, name: str) -> bool:
        """Whether a weight may stay in float whatever becomes of the others."""
        try:
            without(self.placement, _patterns([name]))
        except SpecError:  # its layer shares a padded input with another
            return False
        return True


def in_float(bits: dict[str, int]) -> tuple[str, ...]:
    """The patterns of the weights with 32 bits."""
    return _patterns([name for name, count in bits.items() if count == FLOAT])


def _patterns(names: Collection[str]) -> tuple[str, ...]:
    return tuple(map(glob.escape, names))
