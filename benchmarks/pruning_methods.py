"""The methods that are compared: each makes a smaller Network from the same torch model and the same unlabelled calibration data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import Start
from pruning_models import Amount, Subject
from torch import nn

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.task import Task

HALVINGS = 12  # of the interval in which Torch-Pruning's ratio for a number of MACs is looked for


@dataclass(frozen=True)
class Method:
    """``make(start, subject, amount)``. ``kinds``: the amounts it can be asked for; ``networks``: "all", or "norms" (with batch norms)."""

    name: str
    make: Callable[[Start, Subject, Amount], Network]
    kinds: tuple[str, ...] = ("macs", "ratio")
    networks: str = "all"

    def suits(self, model: nn.Module, amount: Amount) -> bool:
        return amount.kind in self.kinds and (self.networks == "all" or bool(norms(model)))


def captured(model: nn.Module, start: Start) -> Network:
    return capture(model, start.example, more=Task(model, start.example, {"calibrate": start.calibrate}).variations())


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# downsize ---------------------------------------------------------------------------------------------------------------------------------


def dense(start: Start, subject: Subject, amount: Amount) -> Network:
    assert start.model is not None
    return captured(start.model, start)


def downsize(**fields: Any) -> Callable[[Start, Subject, Amount], Network]:
    """``Prune`` with these fields; what is not named keeps its default, but for the samples, of which the subject says how many there are."""

    def make(start: Start, subject: Subject, amount: Amount) -> Network:
        from downsize.techniques.prune import Prune

        assert start.model is not None
        asked: dict[str, Any] = {"samples": subject.samples, "macs" if amount.kind == "macs" else "ratio": amount.left}
        asked |= {"what": ("layers",)} if amount.kind == "layers" else {}
        task = Task(start.model, start.example, {"calibrate": start.calibrate})
        return Prune(**(asked | fields))(captured(start.model, start), task)

    return make


# Torch-Pruning (Fang et al., DepGraph, 2023) ----------------------------------------------------------------------------------------------


def torch_pruning(global_ranking: bool, renormalised: bool) -> Callable[[Start, Subject, Amount], Network]:
    """L2 norms of whole groups, one-shot, ranked over all layers or in each; if asked, batch norms see the calibration data afterwards."""

    def make(start: Start, subject: Subject, amount: Amount) -> Network:
        assert start.model is not None
        if amount.kind == "ratio":
            pruned = cut(start.model, subject, 1 - amount.left, global_ranking)
        else:
            pruned = cut_to_macs(start.model, subject, amount.left, global_ranking)
        if renormalised:
            renormalise(pruned, start)
        return captured(pruned, start)

    return make


def cut(model: nn.Module, subject: Subject, ratio: float, global_ranking: bool) -> nn.Module:
    """A copy of the model without this share of its channels and heads: width by width as its README shows, heads as its examples for BERT do."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]  (a peer, not a dependency)

    model = copy.deepcopy(model)
    heads = subject.heads(model)
    pruner = tp.pruner.BasePruner(
        model,
        subject.sample(),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=global_ranking,
        pruning_ratio=ratio,
        ignored_layers=subject.kept(model),
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=ratio,
        # Its defaults for these are shared by all pruners of a process, which write into them.
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    pruner.step()
    return model.eval()


def cut_to_macs(model: nn.Module, subject: Subject, left: float, global_ranking: bool) -> nn.Module:
    """The copy with the smallest ratio, to 2^-12, that leaves at most this share of the MACs of the layers."""
    most = left * layer_macs(model, subject.sample())
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        pruned = cut(model, subject, ratio, global_ranking)
        if layer_macs(pruned, subject.sample()) <= most:
            high, best = ratio, pruned
        else:
            low = ratio
    if best is None:
        raise ValueError(f"no ratio leaves at most {left:.3g} of the MACs")
    return best


def layer_macs(model: nn.Module, inputs: Any) -> int:
    """The multiply-accumulates of all linear layers and convolutions, on these inputs."""
    counts: list[int] = []

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def renormalise(model: nn.Module, start: Start) -> None:
    """Give every batch norm the statistics of the calibration data, all in one pass, as is usual; nothing else is in training mode."""
    for norm in norms(model):
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
        norm.train()
    # In batches large enough for a variance; those of the calibration data are small to save memory.
    inputs = (inputs for inputs, _ in start.calibrate())
    with torch.no_grad():
        while some := list(itertools.islice(inputs, 8)):
            model(torch.cat(some))
    model.eval()


METHODS = {
    "dense": Method("dense", dense),
    "downsize": Method("downsize", downsize(), ("macs", "ratio", "layers")),
    "downsize-uniform": Method("downsize, uniform widths", downsize(scope="layer"), ("macs",)),
    "downsize-l2": Method("downsize, L2 and refit", downsize(importance="l2")),
    "downsize-unrefitted": Method("downsize, no refit", downsize(refit=False), ("macs", "ratio", "layers")),
    "downsize-l2-unrepaired": Method("downsize, L2, no repair", downsize(importance="l2", refit=False, renormalise=False)),
    "downsize-data-free": Method("downsize, no data", downsize(samples=0)),
    "torch-pruning": Method("Torch-Pruning, uniform", torch_pruning(False, False)),
    "torch-pruning-norms": Method("Torch-Pruning, uniform, batch norms re-estimated", torch_pruning(False, True), networks="norms"),
    "torch-pruning-global": Method("Torch-Pruning, global", torch_pruning(True, False)),
    "torch-pruning-global-norms": Method("Torch-Pruning, global, batch norms re-estimated", torch_pruning(True, True), networks="norms"),
}
BASELINE, OURS = "dense", "downsize"
