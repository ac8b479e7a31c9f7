"""Whether a pruned module computes what the original does when the removed positions are dead: the judge of pruning_zoo.py.

The judge asks no tool what it did. It finds each surviving row and column by its values, which are all different in the zoo, sets every
removed entry of the original's parameters to zero (so that no reader reads a dead position, and products over positions, as of query and
key, lose its term), lets layers that normalize across channels take their statistics over survivors, and compares the outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.structure import as_call

TOLERANCE = 1e-4  # of an output's largest value
NORMS = ("LayerNorm", "RMSNorm", "GroupNorm")
OUTCOMES = ("right", "wrong", "crash", "forward fails", "no answer", "nothing pruned", "not judged")
Kept = list[list[int]]


@dataclass(frozen=True)
class Outcome:
    """One of :data:`OUTCOMES`, why, the fraction of the parameters' entries that went, and the largest relative difference of outputs."""

    word: str
    detail: str = ""
    removed: float = 0.0
    gap: float = float("nan")


def judge(original: nn.Module, prune: Callable[[nn.Module], Any], inputs: Any) -> Outcome:
    """Prune a copy of ``original`` with ``prune`` and say what came of it.

    ``prune`` returns something that is called as the original is, and whose ``named_parameters()`` have its names.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the modules whose forward the judge replaces
    try:
        return _judge(original, prune, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _judge(original: nn.Module, prune: Callable[[nn.Module], Any], inputs: Any) -> Outcome:
    try:
        pruned = prune(copy.deepcopy(original))
    except Exception as error:
        return Outcome("crash", _first_line(error))
    before, after = (sum(p.numel() for _, p in module.named_parameters()) for module in (original, pruned))
    if after >= before:
        return Outcome("nothing pruned")
    removed = 1 - after / before
    try:
        got = outputs(pruned, inputs)
    except Exception as error:
        return Outcome("forward fails", _first_line(error), removed)
    kept = survivors(original, pruned)
    if isinstance(kept, str):
        return Outcome("not judged", kept, removed)
    try:
        expected = outputs(masked(original, kept), inputs)
    except NotImplementedError as error:
        return Outcome("not judged", str(error), removed)
    gap = max(difference(one, two) for one, two in zip(expected, got, strict=True)) if len(expected) == len(got) else float("inf")
    narrower = [number for number, (one, two) in enumerate(zip(expected, got, strict=False)) if one.shape != two.shape]
    detail = f"outputs that lost positions: {narrower}" if narrower else ""
    return Outcome("right" if gap <= TOLERANCE else "wrong", detail, removed, gap)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:120]


def outputs(module: Any, inputs: Any) -> list[Tensor]:
    """The output tensors; caches are left out."""
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return tensors(module(*args, **kwargs))


def tensors(value: Any) -> list[Tensor]:
    """The float tensors in nested containers, in order; anything else (key-value caches) is left out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]


# What went -------------------------------------------------------------------------------------------------------------------------


def survivors(original: nn.Module, pruned: Any) -> dict[str, Kept] | str:
    """Per parameter the indices kept along each dimension; or why they cannot be told."""
    after = dict(pruned.named_parameters(remove_duplicate=False))
    found = {}
    for name, parameter in original.named_parameters():
        # Of a weight under several names a tool may keep any.
        names = [n for n, p in original.named_parameters(remove_duplicate=False) if p is parameter]
        present = [after[n] for n in names if n in after]
        kept = kept_indices(parameter.detach(), present[0].detach()) if present else None
        if kept is None:
            return f"{name} is not a part of the original's"
        found.update(dict.fromkeys(names, kept))
    return found


def kept_indices(original: Tensor, pruned: Tensor) -> Kept | None:
    """The index lists I with ``pruned == original[I0][:, I1]...``, found by values that occur once; None if there are none."""
    if original.shape == pruned.shape and torch.equal(original, pruned):
        return [list(range(size)) for size in original.shape]
    if original.dim() != pruned.dim() or not pruned.numel():
        return None
    values, order, counts = _sorted(original)
    at = torch.searchsorted(values, pruned.flatten().contiguous()).clamp(max=len(values) - 1)
    known = ((values[at] == pruned.flatten()) & (counts[at] == 1)).reshape(pruned.shape)
    places = torch.unravel_index(order[at].reshape(pruned.shape), original.shape)
    kept = []
    for d, place in enumerate(places):
        lines = [(place.select(d, i), known.select(d, i)) for i in range(pruned.shape[d])]
        found = [line[seen].mode().values.item() if seen.any() else -1 for line, seen in lines]
        kept.append([int(index) for index in found])
    if any(-1 in indices for indices in kept):
        return None
    again = original
    for d, indices in enumerate(kept):
        again = again.index_select(d, torch.tensor(indices))
    return kept if torch.equal(again, pruned) else None


def _sorted(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct values in order, a flat index where each stands, and how often it does."""
    values, inverse, counts = torch.unique(tensor.flatten(), return_inverse=True, return_counts=True)
    order = torch.empty(len(values), dtype=torch.long)
    order[inverse] = torch.arange(tensor.numel())
    return values, order, counts


# The oracle ------------------------------------------------------------------------------------------------------------------------


def masked(original: nn.Module, kept: dict[str, Kept]) -> nn.Module:
    """A copy of ``original`` in which every removed entry of every parameter is zero, and norms take their statistics over survivors.

    Weights that are computed from parameters (weight norm) are computed once, from all entries, before.

    Raises:
        NotImplementedError: a norm of a kind that the judge does not know lost channels.
    """
    made = copy.deepcopy(original)
    for path, module in list(made.named_modules()):
        if parametrize.is_parametrized(module):
            _bake(module, path, kept)
    parameters = dict(made.named_parameters(remove_duplicate=False))
    for path, module in list(made.named_modules()):
        name = f"{path}.weight"
        if any(word in type(module).__name__ for word in NORMS) and name in kept and len(kept[name][0]) < len(parameters[name]):
            module.forward = _over_survivors(module, torch.tensor(kept[name][0]))
    for name, indices in kept.items():
        if name in parameters:
            parameters[name].data *= _mask(parameters[name].shape, indices)
    return made


def _bake(module: nn.Module, path: str, kept: dict[str, Kept]) -> None:
    for name in list(module.parametrizations):  # type: ignore[arg-type,union-attr]
        # Of magnitude and direction, the direction has the weight's shape.
        parts = [f"{path}.parametrizations.{name}.original1", f"{path}.parametrizations.{name}.original"]
        found = next((kept[part] for part in parts if part in kept), None)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if found is None:
            raise NotImplementedError(f"{path}.{name} is computed from parameters in a way the judge does not know")
        kept[f"{path}.{name}"] = found


def _mask(shape: torch.Size, kept: Kept) -> Tensor:
    mask = torch.ones(shape)
    for d, indices in enumerate(kept):
        alive = torch.zeros(shape[d])
        alive[indices] = 1
        mask *= alive.reshape([-1 if i == d else 1 for i in range(len(shape))])
    return mask


def _over_survivors(norm: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward of ``norm`` with statistics over the channels ``kept``; dead channels come out as zero."""
    if isinstance(norm, nn.GroupNorm):
        return lambda x: _group_norm(x, norm, kept)
    small: Any = copy.deepcopy(norm)
    for name, parameter in list(norm.named_parameters()):
        if parameter.dim() != 1 or "." in name:
            raise NotImplementedError(f"{type(norm).__name__} lost channels, and has a parameter {name} of shape {list(parameter.shape)}")
        setattr(small, name, nn.Parameter(parameter.detach()[kept]))
    if isinstance(norm, nn.LayerNorm):
        small.normalized_shape = (len(kept),)
    # transformers' layer norm of feature maps says where its channels are.
    dim = 1 if getattr(norm, "data_format", "") == "channels_first" else -1

    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy(dim, kept, small(x.index_select(dim, kept)))

    return forward


def _group_norm(x: Tensor, norm: nn.GroupNorm, kept: Tensor) -> Tensor:
    """Each group normalized over its survivors (Wu and He 2018, arXiv 1803.08494)."""
    made, size = torch.zeros_like(x), norm.num_channels // norm.num_groups
    for group in range(norm.num_groups):
        inside = kept[kept // size == group]
        if len(inside):
            made[:, inside] = F.group_norm(x[:, inside], 1, norm.weight[inside], norm.bias[inside], norm.eps)
    return made


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference relative to the largest value. Where positions of one dimension went, the rest must follow each other as before."""
    if expected.shape != got.shape:
        shorter = [d for d in range(expected.dim()) if got.dim() == expected.dim() and got.shape[d] != expected.shape[d]]
        if len(shorter) != 1 or shorter[0] == 0 or got.shape[shorter[0]] > expected.shape[shorter[0]]:
            return float("inf")
        expected = _subsequence(expected, got, shorter[0])
    gap = float((expected - got).abs().max() / expected.abs().max().clamp(min=1e-30))
    return gap if math.isfinite(gap) else float("inf")


def _subsequence(expected: Tensor, got: Tensor, d: int) -> Tensor:
    """The slices of ``expected`` along ``d``, in order, that fit those of ``got`` best as far as they go from left to right."""
    one, two = (tensor.movedim(d, 0).flatten(1) for tensor in (expected, got))
    chosen, start = [], 0
    for i in range(len(two)):
        last = len(one) - (len(two) - i)
        gaps = (one[start : last + 1] - two[i]).abs().amax(1)
        fits = (gaps <= TOLERANCE * one.abs().max()).nonzero().flatten()
        chosen.append(start + int(fits[0] if len(fits) else gaps.argmin()))
        start = chosen[-1] + 1
    return expected.index_select(d, torch.tensor(chosen))


# Output layers ---------------------------------------------------------------------------------------------------------------------


def output_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers that make the outputs, which no user would prune: those behind which no other layer comes."""
    network = capture(model, inputs)
    output = next(node for node in network.graph.nodes if node.op == "output")
    layers = [node for node in network.graph.nodes if node.op == "call_function" and _is_layer(network, node)]
    every_path = {node for node in layers if not _reaches_layer(network, node)}
    chains = {_end_of_chain(network, node) for node in output.args[0]}  # type: ignore[union-attr]
    paths = {node.meta["module"] for node in (every_path | chains) - {None}}  # type: ignore[union-attr]
    return [model.get_submodule(path) for path in sorted(paths)]


def _is_layer(network: Network, node: Any) -> bool:
    return any(source.op == "get_attr" and network.tensor(source.target).dim() > 1 for source in node.all_input_nodes)


def _reaches_layer(network: Network, node: Any) -> bool:
    pending, seen = list(node.users), set()
    while pending:
        user = pending.pop()
        if user.op != "output" and _is_layer(network, user):
            return True
        pending += [further for further in user.users if further not in seen]
        seen.update(user.users)
    return False


def _end_of_chain(network: Network, node: Any) -> Any:
    """The layer that an output comes from through operators of one tensor only; None where several meet before."""
    while not _is_layer(network, node):
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if len(sources) != 1 or sources[0].op == "placeholder":
            return None
        node = sources[0]
    return node
