"""How a weight is stored: bits, one scale for how many columns, with or without a zero point, on a grid or on levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..numerics.grids import Grid, weight_grid
from ..numerics.groups import group_count

SCALE_BITS = 16  # files hold scales in 16 bits


@dataclass(frozen=True)
class Format:
    """``bits`` a code; one scale for ``group`` columns of a row (None: for the row); ``symmetric``: no zero point; ``levels``: the values.

    Where there is a zero point, codes are unsigned.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    levels: Literal["uniform", "nf4"] = "uniform"

    @property
    def grid(self) -> Grid:
        """The codes."""
        return weight_grid(self.bits) if self.symmetric else Grid(0, 2**self.bits - 1)

    @property
    def is_plain(self) -> bool:
        """Whether there is one scale a row, no zero point, and even steps: what integer kernels take."""
        return self.group is None and self.symmetric and self.levels == "uniform"

    def columns_of_group(self, columns: int) -> int:
        """How many columns share a scale, of a row of so many."""
        return columns if self.group is None else min(self.group, columns)

    def bytes(self, rows: int, columns: int) -> float:
        """What codes, scales and zero points take, packed."""
        groups = rows * group_count(columns, self.columns_of_group(columns))
        return (rows * columns * self.bits + groups * (SCALE_BITS + (0 if self.symmetric else self.bits))) / 8

    def __str__(self) -> str:
        each = "a row" if self.group is None else f"{self.group} columns"
        return f"{'nf4' if self.levels == 'nf4' else f'{self.bits} bits'}, a scale for {each}{'' if self.symmetric else ' with a zero point'}"
