"""Techniques: each a frozen dataclass whose call turns a Network into a Network."""

from .quantize import Quantize

TECHNIQUES = {"quantize": Quantize}
