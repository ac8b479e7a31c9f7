"""Techniques: each a frozen dataclass whose call turns a Network into a Network."""

from .prune import Prune
from .quantize import Quantize
from .sparsify import Sparsify

TECHNIQUES = {"prune": Prune, "sparsify": Sparsify, "quantize": Quantize}
