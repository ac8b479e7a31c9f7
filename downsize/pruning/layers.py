"""Whole layers and residual branches taken out, and the layers before the gaps fitted to what came behind them."""

from __future__ import annotations

from ..network.blocks import blocks, bypass
from ..network.judge import Judge
from ..network.network import Network
from .depth import choose_blocks, main_layers
from .pieces import Data
from .refitting import refit_layers


def drop_layers(network: Network, amount: str, share: float, refit: bool, data: Data) -> Network:
    """The network without the blocks that it does best without.

    Args:
        amount: ``macs`` or ``parameters``, of which ``share`` may remain, or ``ratio``, the share of the repeated layers that stay.
        refit: fit the layers to the original's values: the last one before a gap to what the removed layers gave. Kept if it helps.

    Raises:
        SpecError: so little cannot remain.
    """
    if amount == "ratio":
        among = main_layers(blocks(network))
        chosen = choose_blocks(network, data.trial, layers=round(share * len(among)), among=among)
    else:
        chosen = choose_blocks(network, data.trial, macs=share if amount == "macs" else None, parameters=share if amount == "parameters" else None)
    made = bypass(network, chosen.names)
    if refit:
        judge, fitted = Judge(network, data.held), made.fork()
        refit_layers(network, fitted, data.fit, data.held, spans={span.student: span.teacher for span in chosen.spans})
        made = fitted if judge(fitted) < judge(made) else made
    made.origin["pruned"] = {"by": "layers", "widths": dict.fromkeys(chosen.names, "taken out")}
    return made
