"""Techniques: each a frozen dataclass whose call turns a Network into a Network."""

from .quantize import Quantize
from .sparsify import Sparsify

TECHNIQUES = {"quantize": Quantize, "sparsify": Sparsify}
