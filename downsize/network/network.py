"""The Network: a model as a graph of ATen operators over named tensors, with the structure of its inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ArtifactError
from ..structure import Structure, as_call, looks_like_tensor, select, unflatten
from . import file
from .memory import drop_dead
from .parts import Port, assign

# Operators that behave differently in training: name -> position of their flag.
TRAINING_FLAGS = {
    **{f"aten.{name}.default": 2 for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")},
    **{"aten.batch_norm.default": 5, "aten.instance_norm.default": 5},
    **{f"aten.{name}.input": 6 for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}


@dataclass(eq=False)
class Network:
    """A captured model.

    ``graph_module`` takes the input tensors flat and returns the output tensors flat; ``inputs`` and ``outputs`` are the structures
    (see ``structure.py``) that the original model takes and gives. Every node carries ``meta["module"]`` (the user's module path) and
    ``meta["source"]`` (the user's source line). Edits replace tensors and never write into them, so a fork may share them. ``sparse`` names
    the tensors whose zeros must stay (see :meth:`keep_zeros`), with the most other values that each may have.

    Example: with ``network = capture(model, (x,))`` and ``x`` of [2, 3, 32, 32], ``network(x)`` gives what ``model(x)`` gives, [2, 10].
    """

    graph_module: fx.GraphModule
    inputs: Structure
    outputs: Structure
    ports: tuple[Port, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    sparse: dict[str, int] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph; edit it through ``network.rewrite`` and call :meth:`recompile` after."""
        return self.graph_module.graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it as the original model is run; outputs come in the original structure (a ModelOutput as a dict).

        Raises:
            ArtifactError: the inputs differ in structure, rank, dtype or a fixed dimension from what was captured.
        """
        leaves = self.leaves((args, kwargs))
        return unflatten(self.outputs, list(self.graph_module(*leaves)))

    def predict(self, inputs: Any) -> Any:
        """Run it on the inputs of a batch (a tensor, tuple or dict), without gradients."""
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            return self(*args, **kwargs)

    def flat(self, inputs: Any) -> list[Tensor]:
        """The input tensors of a batch, in the graph's order, checked against the ports."""
        return self.leaves(as_call(inputs))

    def leaves(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
        """The tensors of ``(args, kwargs)`` in the graph's order, checked against the ports."""
        leaves = [_as_tensor(leaf, port) for leaf, port in zip(select(self.inputs, [call[0], call[1]]), self.ports, strict=True)]
        sizes: dict[str, tuple[int, Port]] = {}
        for leaf, port in zip(leaves, self.ports, strict=True):
            fits = leaf.dim() == len(port.dims) and all(isinstance(d, str) or d == size for d, size in zip(port.dims, leaf.shape, strict=True))
            came = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
            if not fits or leaf.dtype != port.dtype:
                raise ArtifactError(f"Input {port.name} is {came}; the network takes {port}.")
            for dim, size in zip(port.dims, leaf.shape, strict=True):
                other, first = sizes.setdefault(str(dim), (size, port))
                if other != size:
                    raise ArtifactError(f"Input {port.name} is {came}, so {dim} is {size}; input {first.name} has {other} there: give one size.")
        return leaves

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor the graph reads, under the user's names, parameters and buffers alike; a shared tensor once per name."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(node.target)
                yield node.target, self.tensor(node.target)

    def parameters(self) -> Iterator[Tensor]:
        """The trainable tensors that the graph reads, each once."""
        found = {id(tensor): tensor for _, tensor in self.named_tensors() if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad}
        return iter(found.values())

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises AttributeError if there is none."""
        path, _, leaf = name.rpartition(".")
        return getattr(self.graph_module.get_submodule(path), leaf)

    def keep_zeros(self, *names: str) -> None:
        """From now on the zeros of these tensors are a mask that every later step keeps; there is no second copy of it.

        A network with more values that are not zero than now in one of them is refused by :meth:`save`, :meth:`check` and
        :meth:`fingerprint`. Forks, copies and files remember it.
        """
        for name in names:
            self.sparse[name] = int(torch.count_nonzero(self.tensor(name)))

    def masks(self) -> dict[str, Tensor]:
        """For each tensor whose zeros must stay, where it may be other than zero, as bool: what a training loop multiplies gradients and
        weights by. Take them before training: they are read off the tensors."""
        return {name: tensor.detach() != 0 for name, tensor in self.named_tensors() if name in self.sparse}

    def train(self) -> Network:
        """Switch batch norm and dropout to training, in place; running statistics then move. Returns itself."""
        return self._flip(training=True)

    def eval(self) -> Network:
        """Switch back to how the model was captured, in place. Returns itself."""
        return self._flip(training=False)

    def _flip(self, training: bool) -> Network:
        for node in self.graph.nodes:
            position = TRAINING_FLAGS.get(str(node.target))
            if node.op == "call_function" and position is not None and len(node.args) > position:
                # A layer captured as training (Monte-Carlo dropout) stays so.
                captured = node.meta.setdefault("captured_flag", node.args[position])
                node.update_arg(position, True if training else captured)
        self.recompile()
        return self

    def fork(self) -> Network:
        """A network with its own graph that shares the tensors: edits of one do not show in the other, training does."""
        root = torch.nn.Module()
        for name, tensor in self.named_tensors():
            assign(root, name, tensor)
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        graph.output(output)
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        return replace(self, graph_module=fx.GraphModule(root, graph), origin=dict(self.origin), sparse=dict(self.sparse))

    def copy(self) -> Network:
        """A network that shares nothing with this one; a tensor with two names keeps both."""
        made = self.fork()
        clones: dict[int, Tensor] = {}
        for name, tensor in list(made.named_tensors()):
            if id(tensor) not in clones:
                clone = tensor.detach().clone()
                clones[id(tensor)] = torch.nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else clone
            assign(made.graph_module, name, clones[id(tensor)])
        return made

    def recompile(self) -> None:
        """Check the edited graph, drop what nothing reads (of tensors whose zeros stay, the names), and make it callable again."""
        drop_dead(self.graph)
        for name in self.sparse.keys() - {node.target for node in self.graph.nodes if node.op == "get_attr"}:
            del self.sparse[name]
        self.graph.lint()
        self.graph_module.recompile()

    def save(self, path: str | Path) -> None:
        """Write it, in evaluation mode, as one safetensors file (JSON graph in its header; no pickle), whole or not at all.

        Raises NetworkFileError when the file cannot be written, or a zero that must stay is one no more. See ``network/file.py``.
        """
        file.save(self._description(), dict(self.named_tensors()), Path(path))

    @staticmethod
    def load(path: str | Path) -> Network:
        """Read what :meth:`save` wrote. Raises NetworkFileError when it is damaged, forged or from another version."""
        return Network(*file.load(Path(path)))

    def fingerprint(self) -> str:
        """sha256 (hex) over the graph in evaluation mode and every tensor: equal for a network and its saved and loaded copy.

        Raises NetworkFileError when a zero that must stay is one no more.
        """
        return file.checksum(*file.describe(self._description(), dict(self.named_tensors())))

    def _description(self) -> file.Description:
        return file.Description(self.fork().eval().graph, self.inputs, self.outputs, self.ports, self.origin, self.sparse)

    def check(self) -> None:
        """Raise NetworkFileError when it could not be saved and loaded again: an operator, argument or name has no place in a file, or a zero
        that must stay is one no more."""
        graph, tensors = file.describe(self._description(), dict(self.named_tensors()))
        file.rebuild(graph, tensors)


def _as_tensor(leaf: Any, port: Port) -> Tensor:
    try:
        return leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"Input {port.name} is no tensor: {error} The network takes {port}.") from None


def batch_of(inputs: Any, rows: list[int] | Tensor) -> Any:
    """The inputs made of those samples of a batch: every tensor whose first dimension is the batch is indexed, the rest is kept.

    ``batch_of(x, [0, 1, 0])`` with ``x`` of [2, 3] gives [3, 3].
    """
    tensors = [leaf for leaf in _tensors(inputs) if leaf.dim()]
    size = tensors[0].shape[0] if tensors else 0
    index = torch.as_tensor(rows)

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index] if value.dim() and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return {key: pick(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(pick, value))
        return type(value)(map(pick, value)) if isinstance(value, (tuple, list)) else copy.copy(value)

    return pick(inputs)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif looks_like_tensor(tree):
        yield torch.as_tensor(tree)
