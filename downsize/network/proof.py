"""Whether two lists of outputs are equal, as far as arithmetic in another order allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CaptureError

RELATIVE_TOLERANCE = 1e-5


def check_equal(expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Check that a captured graph's outputs are the model's: shapes, dtypes, integers and infinities exactly, floats within 1e-5 of the
    largest value.

    Raises:
        CaptureError: naming the output and the gap.
    """
    for number, (one, two) in enumerate(zip(expected, got, strict=True)):
        if one.shape != two.shape or one.dtype != two.dtype:
            raise CaptureError(
                f"Output {number} of the captured graph is {two.dtype}{list(two.shape)}; the model gives {one.dtype}{list(one.shape)}."
            )
        _check_values(number, one.detach(), two.detach())


def _check_values(number: int, one: Tensor, two: Tensor) -> None:
    if not (one.is_floating_point() or one.is_complex()):
        if not torch.equal(one, two):
            raise CaptureError(f"Output {number} of the captured graph differs from the model's: it depends on something other than its inputs.")
        return
    finite = torch.isfinite(one)
    if not torch.equal(torch.nan_to_num(one[~finite]), torch.nan_to_num(two[~finite])):
        raise CaptureError(f"Output {number} of the captured graph differs from the model's where that is infinite or NaN.")
    scale = float(one[finite].abs().max()) if finite.any() else 0.0
    gap = float((one - two)[finite].abs().max()) if finite.any() else 0.0
    if not gap <= max(RELATIVE_TOLERANCE * scale, 1e-30):
        raise CaptureError(
            f"Output {number} of the captured graph differs from the model's by {gap:.3g} (largest value {scale:.3g}): the forward takes "
            "another path for other inputs or sizes. Remove Python conditions on values or sizes from it."
        )
