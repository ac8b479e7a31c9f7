"""What integer kernels ask of weights and activations, and which of them this machine has."""

from __future__ import annotations

from typing import Literal

from ..processor import adds_in_16_bits, processor
from ..progress import Progress
from .bits import FLOAT

Profile = Literal["auto", "x86", "avx2", "tensorrt"]

REDUCED = 7  # bits of weights whose products with unsigned activations can be added by twos in 16 bits
NARROW = (
    "note: weights get at most 7 bits: this processor has no VNNI, and its kernels add products of bytes in 16 bits, where 8 bits would overflow. "
    "For a file that runs on another processor, say profile='x86'."
)


def kernels(profile: Profile, integers: bool) -> Profile:
    """The profile itself; of ``auto`` the one for this machine's processor, where weights are multiplied as ``integers`` of 8 bits."""
    if profile != "auto":
        return profile
    return "avx2" if integers and adds_in_16_bits(processor().features) else "x86"


def room(bits: int, profile: Profile) -> int:
    """The bits of a weight, fewer where the profile has no room for them; 32 is a float and stays."""
    return min(bits, REDUCED) if profile == "avx2" and bits != FLOAT else bits


def tell(asked: Profile, wanted: int, most: int, progress: Progress | None) -> None:
    """Say where weights lose a bit by what ``auto`` took: as many bits are ``wanted``, and there is room for so many."""
    if progress and asked == "auto" and wanted > most:
        progress.say(NARROW)
