"""A network with everything quantized: weights at their bits or levels, activations on their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import fx

from ..network.fold import fold_constants, part_constants
from ..network.network import Network
from ..network.rewrite import aten, drop_identities, fold_padding
from ..numerics.grids import weight_grid
from ..numerics.lowbit import Levels
from .bits import FLOAT, Bits
from .choosing import own
from .insertion import quantize_activations, quantize_to_levels, quantize_weights
from .placement import Placement, WeightPoint
from .ranges import Range


def prepared(network: Network) -> Network:
    """A fork in evaluation mode with plain weights: what is computed (weight norm) is computed once, what is read in parts (attention) is parted."""
    made = network.fork().eval()
    fold_constants(made)
    part_constants(made)
    drop_identities(made)
    fold_padding(made)
    return made


@dataclass(frozen=True)
class Build:
    """Puts fake quantizers into a network, weights rounded to nearest. ``levels``: of the weights between the ends; ``embeddings``: tables too."""

    counts: Bits
    levels: Levels | Literal["nf4"]
    embeddings: bool

    def __call__(self, plain: Network, placement: Placement, ranges: dict[fx.Node, Range], bits: Mapping[str, int] | None) -> Network:
        """The network, quantized; ``bits``: of single weights, by name; None: weights stay as they are."""
        made = plain.fork()
        moved = placement.on(made)
        by_name = {node.name: bounds for node, bounds in ranges.items()}
        for grid, part in self.counts.groups(made, moved):
            quantize_activations(made, part, {node: by_name[node.name] for node in own(part)}, grid)
        if bits is not None:
            self.weights(made, moved, bits)
            made.origin |= {"bits": dict(bits)} if bits else {}
        made.recompile()
        return made

    def weights(self, network: Network, placement: Placement, bits: Mapping[str, int]) -> None:
        """Quantize the weights in place; ``bits``: of single ones, by name."""
        at_ends, inner = self.counts.parts(network, placement, self.takes)
        if self.levels != "uniform":
            if self.counts.ends != FLOAT:
                quantize_weights(network, at_ends, weight_grid(self.counts.of_weights[0]))
            quantize_to_levels(network, inner, cast(Levels, self.levels))
            return
        for count, points in self.counts.shares(network, placement, self.takes, bits).items():
            if count != FLOAT:
                quantize_weights(network, points, weight_grid(count))

    def takes(self, point: WeightPoint) -> bool:
        """Whether a weight is quantized at all."""
        return self.embeddings or not all(user.target is aten.embedding.default for user in point.node.users)
