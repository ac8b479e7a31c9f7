"""Scales moved between layers before anything is rounded, kept where plain rounding then loses less."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..network.network import Network
from ..network.statistics import Pieces
from .choosing import TRIAL_PIECES, spread
from .equalization import equalize
from .placement import place
from .smoothing import smooth

ROUNDING_PIECES = 40  # pieces (of one sample or a few) that are enough to solve for weights

# Changes a network in place, given pieces to measure on and others to judge by; how many layers were changed.
Balance = Callable[[Network, tuple[Pieces, Pieces]], int]


def balanced(plain: Network, pieces: tuple[Pieces, Pieces], loss_of: Callable[[Network], float], ways: Sequence[Balance]) -> Network:
    """The network with each of the ``ways`` applied that lowers the loss of its plainly rounded form; else as it came."""
    loss = None
    for balance in ways:
        trial = plain.fork()
        if balance(trial, pieces):
            loss = loss_of(plain) if loss is None else loss
            if (lower := loss_of(trial)) < loss:
                loss, plain = lower, trial
    return plain


def equalized(network: Network, pieces: tuple[Pieces, Pieces]) -> int:
    """Channels that a layer makes and the next reads get the same range on both sides."""
    return equalize(network)


def smoothed(network: Network, pieces: tuple[Pieces, Pieces]) -> int:
    """What linear layers read gets channels of like ranges."""
    return smooth(network, place(network), spread(pieces[0], ROUNDING_PIECES), spread(pieces[1], TRIAL_PIECES))
