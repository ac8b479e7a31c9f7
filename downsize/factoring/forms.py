"""A layer, or linear layers that read the same value, decomposed: which ranks are worth trying, and the factors at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..numerics.lowrank import Spectrum, by_frequency, evbmf_rank, of_tied, spectrum
from ..numerics.lowrank_convolutions import FORMS, Convolution, Factored
from .layers import Layer, is_tied
from .rewriting import Product

# At most so many ranks of a matrix are looked at.
MOST_RANKS = 48
CONVOLVED: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
Candidate = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of what layers read: the Gram matrix, [groups, columns + 1, columns + 1], or how often each row of a table is looked up,
    [tokens]; None: nothing. ``damping``: of the Gram matrix, as a part of its mean diagonal."""

    gram: Tensor | None = None
    counts: Tensor | None = None
    damping: float = 0.0


class Decomposed:
    """Layers (several: linear ones that read the same value, and share the first factor; or a table and the linear layer that has its weight,
    and share the narrow table) in all forms; what ranks share is computed once.

    Args:
        weights: what is decomposed in place of each layer's own weight, of the same shape.
        forms: of convolutions, names of :data:`~downsize.numerics.lowrank_convolutions.FORMS`.
    """

    def __init__(self, layers: Sequence[Layer], weights: Sequence[Tensor], known: Known, forms: Sequence[str]) -> None:
        self.layers, self.known, self.forms = tuple(layers), known, tuple(forms)
        self.weights = [weight.detach() for weight in weights]
        self.is_tied = is_tied(layers)
        self._conv = replace(layers[0].dense, weight=self.weights[0])
        self._spectrum: Spectrum | None = None
        self._prepared: dict[str, Callable[[tuple[int, ...]], Factored]] = {}

    def candidates(self, multiple: int) -> list[Candidate]:
        """The forms with the ranks worth trying, multiples where there is room for several."""
        if self.layers[0].kind == "conv":
            return [(form, ranks) for form in self.forms for ranks in FORMS[form].ranks(self._conv, multiple)]
        name, rows, columns = self._name, sum(map(len, self._stacked)), self.weights[0].shape[1]
        most = min(rows, columns)
        grain = multiple if most >= 4 * multiple else 1
        # Beyond this there are more products than without factors.
        ranks = range(grain, min(most, rows * columns // (rows + columns)) + 1, grain)
        picked = np.unique(np.linspace(0, len(ranks) - 1, min(MOST_RANKS, len(ranks))).round().astype(int))
        return [(name, (ranks[number],)) for number in picked]

    def by_evidence(self) -> list[Candidate]:
        """The candidates whose ranks variational Bayes finds in the weights: of matrices, and of convolutions in forms made of matrices."""
        if self.layers[0].kind != "conv":
            return [(self._name, (rank,))] if (rank := evbmf_rank(torch.cat(self._stacked))) else []
        weight = self.weights[0]
        if self._conv.groups > 1:
            return []
        outputs, inputs = evbmf_rank(weight.flatten(1)), evbmf_rank(weight.transpose(0, 1).flatten(1))
        tried = {"channel": (outputs,), "tucker": (inputs, outputs)}
        return [(form, ranks) for form, ranks in tried.items() if form in self.forms and FORMS[form].ranks(self._conv, 1) and all(ranks)]

    def products(self, form: str, ranks: tuple[int, ...]) -> tuple[list[Product], float]:
        """What takes the layers' places, and the squared error of their outputs as a part of their energy (of several: the mean)."""
        if self.layers[0].kind == "conv":
            if form not in self._prepared:
                self._prepared[form] = FORMS[form].prepare(self._conv, self.known.gram, self.known.damping)
            found = self._prepared[form](ranks)
            return [Product(self.layers[0], found.factors, found.shift)], found.error
        first, second, shift = self.spectrum.factors(ranks[0])
        if self.is_tied:
            table, linear = self.layers
            narrow, loss = _matrix(second), self.spectrum.error(ranks[0])
            looked_up = Product(table, (narrow, _matrix(first.mT)), torch.zeros(table.width, dtype=first.dtype))
            return [looked_up, Product(linear, (_matrix(first), narrow), shift, ("third", "first"))], loss
        if self.layers[0].kind == "embedding":
            return [Product(self.layers[0], (_matrix(first.mT), _matrix(second)), shift)], self.spectrum.error(ranks[0])
        shared, rows = _matrix(first), [len(weight) for weight in self.weights]
        parts = zip(self.layers, second.split(rows), shift.split(rows), strict=True)
        return [Product(layer, (shared, _matrix(part)), moved) for layer, part, moved in parts], self.spectrum.error(ranks[0])

    @property
    def _name(self) -> str:
        return "tied" if self.is_tied else "table" if self.layers[0].kind == "embedding" else "matrix"

    @property
    def _stacked(self) -> list[Tensor]:
        """The weights of which one matrix is made, one under the other."""
        return self.weights[:1] if self.is_tied else self.weights

    @property
    def spectrum(self) -> Spectrum:
        """Of linear layers, one under the other, or of a table, which a linear layer may have, too."""
        if self._spectrum is None:
            known, gram = self.known, None if self.known.gram is None else self.known.gram[0]
            if self.layers[0].kind == "embedding":
                table = self.weights[0]
                counts = torch.zeros(len(table)) if known.counts is None else known.counts
                self._spectrum = of_tied(table, counts, gram, known.damping) if self.is_tied else by_frequency(table, counts)
            else:
                importance = self._importance(gram) if len(self.weights) > 1 else None
                self._spectrum = spectrum(torch.cat(self.weights), gram, known.damping, importance)
        return self._spectrum

    def _importance(self, gram: Tensor | None) -> Tensor:
        """Of each row: errors of each layer count by its own output's energy."""
        energies = [spectrum_energy(weight, gram) for weight in self.weights]
        return torch.cat([torch.full((len(weight),), 1 / max(energy, 1e-30)) for weight, energy in zip(self.weights, energies, strict=True)])


def spectrum_energy(weight: Tensor, gram: Tensor | None) -> float:
    """Of a layer's centred output, summed over positions; without a Gram matrix of the weight's squares."""
    double = weight.double()
    if gram is None:
        return float(double.square().sum())
    return float(((double @ gram[:-1, :-1]) * double).sum() - (double @ gram[:-1, -1]).square().sum() / gram[-1, -1])


def _matrix(weight: Tensor) -> Convolution:
    return Convolution(weight, (), (), ())


def composed(product: Product) -> Tensor:
    """The weight of the layer that computes what the factors do, [outputs, inputs / groups, ...]; of a table with the shift in its rows.

    Double precision. A convolution is found by its response to an impulse in each input.
    """
    factors = [factor.weight.double() for factor in product.factors]
    if product.layer.kind == "embedding":
        return factors[0] @ factors[1].mT + product.shift.double()
    if product.layer.kind == "linear":
        return torch.linalg.multi_dot(factors[::-1]) if len(factors) > 1 else factors[0]
    dense = product.layer.dense
    dims = dense.weight.dim() - 2
    value = torch.eye(dense.inputs, dtype=torch.float64).reshape(dense.inputs, dense.inputs, *[1] * dims)
    for weight, factor in zip(factors, product.factors, strict=True):
        value = CONVOLVED[dims](value, weight, padding=[size - 1 for size in factor.kernel], groups=factor.groups)
    value = value.flip(*range(2, 2 + dims)).transpose(0, 1)
    # Of the inputs of other groups there is nothing.
    parts = [part.chunk(dense.groups, 1)[number] for number, part in enumerate(value.chunk(dense.groups))]
    return torch.cat(parts).contiguous()
