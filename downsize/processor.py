"""The processor of this machine: its name, its instruction sets, and whether it adds products of bytes without loss."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The instruction sets that decide how fast matrix products and 8-bit integers are, as Linux spells them.
_FEATURES = re.compile(r"(avx2|avx512.*|avx_.*|avx10.*|amx.*|fma|f16c|neon|asimd.*|fphp|sve.*|sme\d?|sme_.*|i8mm|bf16|v|zvfh)$")
# One of them is there on x86 processors that multiply bytes and add in 32 bits.
_ADDS_IN_32_BITS = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


class Processor(NamedTuple):
    """The processor's name, and those of its instruction sets that decide speed; none where the system does not say."""

    name: str
    features: tuple[str, ...]


@cache
def processor() -> Processor:
    """The processor of this machine."""
    fields = _cpuinfo()
    words = (fields.get("flags") or fields.get("Features") or fields.get("isa", "")).split()
    name = fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()
    return Processor(name, tuple(sorted({word for word in words if _FEATURES.match(word)})))


def adds_in_16_bits(features: Collection[str]) -> bool:
    """Whether an x86 processor adds two products of an unsigned and a signed byte in 16 bits (VPMADDUBSW), where large ones saturate.

    One of which the system tells nothing (only Linux is asked) counts as such: that costs a bit, and never a wrong sum.

    >>> adds_in_16_bits({"avx2", "fma"}), adds_in_16_bits({"avx2", "avx512_vnni"}), adds_in_16_bits({"asimd"})
    (True, False, False)
    """
    unknown = not features and platform.machine().lower() in ("x86_64", "amd64")
    return unknown or ("avx2" in features and not _ADDS_IN_32_BITS & set(features))


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = [(key.strip(), value.strip()) for key, colon, value in (line.partition(":") for line in lines) if colon]
    return dict(reversed(pairs))  # the first of each key wins
