"""downsize: from a trained PyTorch model to a smaller, faster file that runs, with a measured verdict.

    import downsize as ds
    result = ds.fit(ds.Task(model, example, data), ds.Target(size="1 MB", drop="1 %"), into="runs/a")

The names below are brought when they are first used, so that opening and running a file does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import measure, scores
    from .errors import DownsizeError
    from .facts import VERSION as __version__
    from .facts import Artifact, Verdict
    from .network.capture import capture
    from .network.network import Network
    from .planner import fit, run
    from .recipe import Recipe
    from .runtimes import open_artifact as open
    from .target import Target
    from .task import Task
    from .techniques.compensate import Compensate as compensate
    from .techniques.distill import Distill as distill
    from .techniques.factorize import Factorize as factorize
    from .techniques.finetune import Finetune as finetune
    from .techniques.halve import Halve as halve
    from .techniques.prune import Prune as prune
    from .techniques.quantize import Quantize as quantize
    from .techniques.sparsify import Sparsify as sparsify

__all__ = [
    "Artifact",
    "DownsizeError",
    "Network",
    "Recipe",
    "Target",
    "Task",
    "Verdict",
    "__version__",
    "capture",
    "compensate",
    "distill",
    "factorize",
    "finetune",
    "fit",
    "halve",
    "measure",
    "open",
    "prune",
    "quantize",
    "run",
    "scores",
    "sparsify",
]

# Each name and where it lies, module.name; a module alone is itself the thing.
FACE = {
    "Artifact": "facts.Artifact",
    "DownsizeError": "errors.DownsizeError",
    "Network": "network.network.Network",
    "Recipe": "recipe.Recipe",
    "Target": "target.Target",
    "Task": "task.Task",
    "Verdict": "facts.Verdict",
    "__version__": "facts.VERSION",
    "capture": "network.capture.capture",
    "compensate": "techniques.compensate.Compensate",
    "distill": "techniques.distill.Distill",
    "factorize": "techniques.factorize.Factorize",
    "finetune": "techniques.finetune.Finetune",
    "fit": "planner.fit",
    "halve": "techniques.halve.Halve",
    "measure": "measure",
    "open": "runtimes.open_artifact",
    "prune": "techniques.prune.Prune",
    "quantize": "techniques.quantize.Quantize",
    "run": "planner.run",
    "scores": "scores",
    "sparsify": "techniques.sparsify.Sparsify",
}


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module 'downsize' has no attribute {name!r}")
    module, _, attribute = FACE[name].rpartition(".")
    if not module:
        return importlib.import_module(f"{__name__}.{attribute}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE})
