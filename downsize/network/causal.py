"""Masks of torch's transformer layers while a model is exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules import transformer

NAME = "_detect_is_causal_mask"


@contextlib.contextmanager
def masks_by_value() -> Iterator[None]:
    """While inside, a mask given to ``nn.Transformer`` and its layers is what its values say, and nothing else.

    By themselves they look at the values to find out whether the mask is the causal one, so as to run faster kernels; no export can follow a
    branch on values. What is computed is the same. Where the user says ``is_causal=True``, that stays.
    """
    own = getattr(transformer, NAME, None)
    if own is None:
        yield
        return

    def as_said(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    setattr(transformer, NAME, as_said)
    try:
        yield
    finally:
        setattr(transformer, NAME, own)
