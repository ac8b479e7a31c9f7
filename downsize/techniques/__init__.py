"""Techniques: each a frozen dataclass whose call turns a Network into a Network."""

from .compensate import Compensate
from .distill import Distill
from .factorize import Factorize
from .finetune import Finetune
from .halve import Halve
from .prune import Prune
from .quantize import Quantize
from .sparsify import Sparsify

TECHNIQUES = {
    "prune": Prune,
    "factorize": Factorize,
    "finetune": Finetune,
    "distill": Distill,
    "sparsify": Sparsify,
    "quantize": Quantize,
    "compensate": Compensate,
    "halve": Halve,
}
