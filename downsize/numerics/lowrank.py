"""Matrices of low rank: which directions of a layer's output to keep, what is lost without the others, and the two factors.

With C the covariance of the inputs, leaving the directions U of the output to the mean costs ``tr(U^T W C W^T U)``. So the eigenvectors of
``W C W^T`` are the singular vectors of the whitened weight ``W C^(1/2)``, without an inverse: C may be singular. Wang et al. 2024, SVD-LLM
(arXiv 2403.07378), whiten by a Cholesky factor and do not centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import root_scalar
from torch import Tensor

# Added to the diagonal of every covariance, as a part of its mean: directions that the data leave open are then ordered by the weight.
OPEN = 1e-10
# A direction that carries less than this part of the largest is scaled as if it carried so much.
FAINT = 1e-4
# The analytic noise variance is looked for on so many points, and never below this part of the largest one possible.
NOISE_POINTS = 400
SMALLEST_NOISE = 1e-14


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A weight [rows, columns] as a sum of k = min(rows, columns) products ``left[:, i] right[i]``, the most telling first.

    left: [rows, k]. right: [k, columns]. values: [k], falling, the size of each product in the output: singular values of the (whitened)
    weight. lost: [k], the squared output error without it, summed over positions; values squared when nothing damps. mean: [columns], of
    the inputs. energy: of the centred output, summed over positions. positions: how many. All double precision.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    mean: Tensor
    energy: float
    lost: Tensor
    positions: float

    @property
    def errors(self) -> Tensor:
        """The squared output error at rank 0, 1, ... k, as a part of the energy: [k + 1], never rising, the last one 0."""
        left = self.lost.flip(0).cumsum(0).flip(0)
        return torch.cat([left, left.new_zeros(1)]) / (self.energy or 1.0)

    def error(self, rank: int) -> float:
        """The squared output error at that rank, as a part of the energy."""
        return float(self.errors[self._checked(rank)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """first [rank, columns], second [rows, rank], shift [rows]: ``second @ first`` stands for the weight, the shift is added to the bias.

        Balanced: what a row of the first factor gives has the root mean square (without a Gram matrix: the row itself has the length) of
        the second factor's column that reads it.

        Raises:
            ValueError: the rank is not among 0 ... k.
        """
        rank = self._checked(rank)
        left, right = self.left[:, :rank], self.right[:rank]
        faintest = FAINT * float(self.values.max()) if len(self.values) else 0.0
        size = self.values[:rank].clamp(min=faintest or 1.0) / self.positions**0.5
        scale = (size / left.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        shift = self.left[:, rank:] @ (self.right[rank:] @ self.mean)
        return right / scale[:, None], left * scale, shift

    def _checked(self, rank: int) -> int:
        if not 0 <= rank <= len(self.values):
            raise ValueError(f"rank {rank} came; expected 0 to {len(self.values)}.")
        return rank


def spectrum(weight: Tensor, gram: Tensor | None = None, damping: float = 0.0, importance: Tensor | None = None) -> Spectrum:
    """The spectrum of a layer's weight on the inputs that it reads: at each rank the least output error there is (Eckart and Young, 1936).

    Layers that read the same input share the first factor of the spectrum of their weights, one under the other.

    Args:
        weight: [rows, columns].
        gram: [columns + 1, columns + 1], the sum over positions of ``x x^T`` with a 1 behind x. None: every column counts alike, and
            nothing is centred.
        damping: added to the diagonal of the inputs' covariance, as a part of its mean, when directions are chosen. The errors that
            are told stay those of the covariance itself.
        importance: [rows], above zero, the weight of each row's squared error.

    Raises:
        ValueError: the shapes do not fit, the Gram matrix is of no positions, or a value is NaN or infinite.
    """
    finite(weight)
    rows = torch.ones(len(weight), dtype=torch.float64) if importance is None else importance.double().sqrt()
    if rows.shape != weight.shape[:1] or not bool((rows > 0).all()):
        raise ValueError(f"importance {list(rows.shape)} came for a weight {list(weight.shape)}; expected a number above 0 for each row.")
    scaled = weight.double() * rows[:, None]
    if gram is None:
        left, values, lost = directions(scaled)
        mean, energy, positions = torch.zeros(weight.shape[1], dtype=torch.float64), float(scaled.square().sum()), 1.0
    else:
        covariance, mean, positions = centred(gram, weight.shape[1])
        left, values, lost = directions(scaled, covariance, raised(covariance, damping + OPEN))
        energy = float((scaled @ covariance * scaled).sum())
    return Spectrum(left / rows[:, None], values, left.mT @ scaled, mean, energy, lost, positions)


def centred(gram: Tensor | None, columns: int) -> tuple[Tensor, Tensor, float]:
    """The covariance of inputs [columns, columns] as a sum over positions, their mean, and the number of positions.

    Raises:
        ValueError: the shape does not fit, there are no positions, or a value is NaN or infinite.
    """
    if gram is None:
        return torch.eye(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64), 1.0
    if gram.shape != (columns + 1, columns + 1):
        raise ValueError(f"a Gram matrix {list(gram.shape)} came for {columns} columns; expected {[columns + 1] * 2}, a 1 behind each input.")
    finite(gram)
    sums, positions = gram[-1, :-1].double(), float(gram[-1, -1])
    if positions <= 0:
        raise ValueError("a Gram matrix of no positions came; expected at least one.")
    covariance = gram[:-1, :-1].double() - sums[:, None] * sums / positions
    return (covariance + covariance.mT) / 2, sums / positions, positions


def finite(values: Tensor) -> None:
    """Raises ValueError if one is NaN or infinite: no decomposition of it would end well."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{int((~values.isfinite()).sum())} of {values.numel()} values are NaN or infinite; expected finite ones.")


def raised(covariance: Tensor, damping: float) -> Tensor:
    """[..., n, n] with that part of its mean added to its diagonal; of nothing at all, that part of 1."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = damping * torch.where(mean > 0, mean, 1.0)
    return covariance + added[..., None, None] * torch.eye(covariance.shape[-1], dtype=covariance.dtype)


def directions(weight: Tensor, covariance: Tensor | None = None, damped: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenvectors [..., rows, k] of ``W C W^T`` with the damped C, the roots of its eigenvalues [..., k], and the error without each.

    Without C, of ``W W^T``: a wide weight would else be multiplied with a large matrix of nothing but ones and zeros.
    """
    outer = None
    if weight.shape[-2] > weight.shape[-1]:
        outer, weight = torch.linalg.qr(weight)
    squares, vectors = torch.linalg.eigh((weight if damped is None else weight @ damped) @ weight.mT)
    vectors, squares = vectors.flip(-1), squares.flip(-1)
    read = vectors.mT @ weight
    lost = ((read if covariance is None else read @ covariance) * read).sum(-1).clamp(min=0)
    return vectors if outer is None else outer @ vectors, squares.clamp(min=0).sqrt(), lost


def by_frequency(table: Tensor, counts: Tensor) -> Spectrum:
    """The spectrum of an embedding table [rows, width] as a layer that reads one-hot vectors: of its transpose, [width, rows].

    ``first.T`` [rows, rank] is the smaller table, ``second`` [width, rank] and the shift [width] the linear layer behind it. Rows count as
    often as they occur. Those that never did share the probability that the next one is new, by Good (1953, "The population frequencies
    of species"): as many occurrences as there are rows seen once, but not more than one each.

    Args:
        counts: [rows], how often each row was looked up; all zero: all alike.

    Raises:
        ValueError: the shapes do not fit, a count is negative, or a value is NaN or infinite.
    """
    finite(table)
    often = _occurrences(table, counts)
    total, weight = often.sum(), table.double().mT
    sums = weight @ often
    covariance = (weight * often) @ weight.mT - sums[:, None] * sums / total
    # The covariance of the output itself, so the "weight" that reads it is the identity.
    identity = torch.eye(len(weight), dtype=torch.float64)
    left, values, lost = directions(identity, covariance, raised(covariance, OPEN))
    return Spectrum(left, values, left.mT @ weight, often / total, float(covariance.trace()), lost, float(total))


def _occurrences(table: Tensor, counts: Tensor) -> Tensor:
    """How often each row is to be expected, [rows], above zero: see :func:`by_frequency`."""
    if counts.shape != table.shape[:1] or bool((counts < 0).any()):
        raise ValueError(f"counts {list(counts.shape)} came for a table {list(table.shape)}; expected one for each row, none below 0.")
    often = counts.double()
    unseen = often == 0
    new = min(float(((often > 0) & (often <= 1)).sum()) or 1.0, float(unseen.sum()))
    return torch.where(unseen, new / unseen.sum().clamp(min=1), often)


def of_tied(table: Tensor, counts: Tensor, gram: Tensor | None = None, damping: float = 0.0) -> Spectrum:
    """The spectrum of a table [rows, width] that is looked up and, as the weight of a linear layer, scores what it reads against every row.

    ``second`` [rows, rank] is the smaller table, and the second factor of the layer; ``first`` [rank, width] the layer's first, and ``first.T``
    the layer behind the table. The shift [rows] is the linear layer's. What the table loses counts rows by frequency and columns alike, what
    the layer loses rows alike and columns by its inputs; there is no closed form for the sum of both, but for rows weighed by the mean of the
    two and columns by the mean of the two. (In a small language model with a table of 4,000 x 128 at rank 32, 64 and 96 it left a loss of
    3.928, 3.689 and 3.658 of 3.650, ten rounds of alternating least squares on the sum 3.916, 3.688 and 3.658, the singular values of the
    table alone 3.961, 3.702 and 3.662.)

    The errors are the mean of the two outputs' own: of what is looked up, as often as it is, and of the scores, both as parts of the centred
    outputs' energies.

    Args:
        counts: [rows], how often each row was looked up. gram, damping: see :func:`spectrum`, of what the linear layer reads.

    Raises:
        ValueError: as :func:`by_frequency` and :func:`spectrum`.
    """
    finite(table)
    often = _occurrences(table, counts)
    covariance, mean, _ = centred(gram, table.shape[1])
    alike = torch.eye(len(covariance), dtype=torch.float64)
    read = raised(covariance, damping + OPEN) if gram is not None else covariance
    columns = (read / read.diagonal().mean() + alike) / 2
    rows = ((often / often.mean() + 1) / 2).sqrt()
    scaled = table.double() * rows[:, None]
    left, values, _ = directions(scaled, columns, columns)
    left, right = left / rows[:, None], left.mT @ scaled
    # With left right = the table, what ranks from r on leave out is left[:, r:] right[r:]: its squares in either metric are sums over pairs of them.
    looked_up = (left.mT * often) @ left * (right @ right.mT)
    scored = left.mT @ left * (right @ covariance @ right.mT)
    centre = (often @ table.double()).square().sum() / often.sum()
    energies = float(looked_up.sum() - centre), float(scored.sum())
    shares = [_behind(part) / (energy or 1.0) for part, energy in zip((looked_up, scored), energies, strict=True)]
    errors = (shares[0] + shares[1]) / 2
    return Spectrum(left, values, right, mean, 1.0, errors[:-1] - errors[1:], 1.0)


def _behind(pairs: Tensor) -> Tensor:
    """For each rank r = 0 ... k the sum of ``pairs[r:, r:]``: [k + 1]."""
    return torch.cat([pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0), pairs.new_zeros(1)])


def energy_rank(values: Tensor, share: float) -> int:
    """The smallest rank whose singular values hold that share (0 to 1) of the sum of their squares."""
    squares = values.double().square()
    wanted = share * float(squares.sum())
    # A share of 1 must not ask for more than rounding lets the sum reach.
    return int((squares.cumsum(0) < wanted * (1 - 1e-12)).sum()) + 1 if wanted > 0 else 0


def evbmf_rank(weight: Tensor) -> int:
    """The rank that empirical variational Bayesian matrix factorization finds beneath noise of unknown variance.

    The global solution in closed form: Nakajima et al. 2013, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization" (JMLR 14), with the search for the noise variance between its bounds.

    Args:
        weight: [rows, columns], one of them may be larger.
    """
    short, long = sorted(weight.shape)
    if not short:
        return 0
    squares = torch.linalg.svdvals(weight.double()).square().numpy() / long
    alpha = short / long
    least = float(root_scalar(lambda tau: _evidence(tau) + _evidence(tau / alpha), bracket=(1e-6, 100.0)).root)
    threshold = (1 + least) * (1 + alpha / least)
    most = squares.mean()
    if most <= 0:
        return 0
    # No more components than this can be told from noise.
    kept = min(int(np.ceil(short / (1 + alpha))) - 1, short - 1)
    lowest = max(squares[kept] / threshold, squares[kept:].mean(), SMALLEST_NOISE * most)
    kinks = squares[(squares > lowest * threshold) & (squares < most * threshold)] / threshold
    tried = np.unique(np.concatenate([np.geomspace(min(lowest, most), most, NOISE_POINTS), kinks, kinks * (1 + 1e-9)]))
    energies = [_free_energy(squares, noise, alpha, threshold) for noise in tried]
    return int((squares > tried[int(np.argmin(energies))] * threshold).sum())


def _evidence(z: float) -> float:
    """Whose zero is where a component's evidence outweighs its cost."""
    return float(np.log1p(z)) / z - 0.5


def _free_energy(squares: np.ndarray, noise: float, alpha: float, threshold: float) -> float:
    """The free energy of the best factorization at a noise variance, up to what does not depend on it."""
    x = squares / noise
    kept = x[x > threshold]
    tau = (kept - 1 - alpha + np.sqrt(np.maximum((kept - 1 - alpha) ** 2 - 4 * alpha, 0.0))) / 2
    return float((x + np.log(noise)).sum() + (np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau).sum())
