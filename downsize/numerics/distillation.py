"""How far a student is from its teacher: losses of outputs, of features, and of relations between samples or positions.

All are differentiable scalars, 0 where the student gives what the teacher gives, computed in single precision at least; the teacher's side
should come without gradients. ``[..., n]`` stands for any leading dimensions, over which the mean is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, normalize, smooth_l1_loss, softmax

# Below this a length is taken for it, so that nothing is divided by zero.
SMALLEST = 1e-8
# How the two parts of decoupled distillation are weighted by its authors.
TARGET, OTHERS = 1.0, 8.0
# What standardized scores weigh: their authors' 9 beside 0.1 of the labels' loss is 10 times 0.9 here.
STANDARDIZED = 10.0
# What the similarities of a batch weigh beside the cosines of its samples.
SIMILARITY = 5.0


def wide(value: Tensor) -> Tensor:
    """The same in single precision, if it has less."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


# Class scores -------------------------------------------------------------------------------------------------------------------------


def soft_logits(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of the class probabilities at temperature T, in nats (Hinton et al. 2015, arXiv 1503.02531).

    For large T it tends to half the mean squared distance of the scores less their means over the classes.

    Args:
        student, teacher: scores [..., classes].
    """
    return temperature**2 * _kl(log_softmax(wide(student) / temperature, -1), log_softmax(wide(teacher) / temperature, -1)).mean()


def standardized(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """10 times :func:`soft_logits` of the scores less their mean and over their standard deviation, each sample's over its classes (Sun et al.
    2024, Logit Standardization, arXiv 2403.01427): a student too small for the teacher's sure answers learns how the classes relate.

    Args:
        student, teacher: scores [..., classes]; infinite ones stay and count in neither figure.
    """
    return STANDARDIZED * soft_logits(_standard(wide(student)), _standard(wide(teacher)), temperature)


def _standard(scores: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last dimension; 0 where all are equal."""
    finite = torch.isfinite(scores)
    count = finite.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(finite, scores, 0.0).sum(-1, keepdim=True) / count
    centred = torch.where(finite, scores - mean, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return torch.where(finite, centred / variance.clamp(min=SMALLEST**2).sqrt(), scores)


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times (1 - correlation over the classes of each sample, plus 1 - correlation over the samples of each class) of the probabilities
    at temperature T (Huang et al. 2022, DIST, arXiv 2205.10536): it asks for the teacher's order rather than for its numbers.

    Args:
        student, teacher: scores [..., classes]; all leading dimensions are samples. Where the teacher does not vary, there is nothing to
            correlate with, and the term is left out.
    """
    one, two = (softmax(wide(scores) / temperature, -1).reshape(-1, scores.shape[-1]) for scores in (student, teacher))
    return temperature**2 * (_uncorrelated(one, two) + _uncorrelated(one.T, two.T))


def dkd(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float = 4.0, target: float = TARGET, others: float = OTHERS) -> Tensor:
    """T^2 (target TCKD + others NCKD): divergence of the right class' share, and that among the other classes (Zhao et al. 2022, Decoupled
    Knowledge Distillation, arXiv 2203.08679). Hinton's loss weighs the second by the teacher's doubt, 1 - p.

    Args:
        student, teacher: scores [..., classes], of two classes or more.
        classes: the right classes, int [...].
    """
    one, two = (log_softmax(wide(scores) / temperature, -1) for scores in (student, teacher))
    right = torch.zeros_like(one, dtype=torch.bool).scatter(-1, classes[..., None].long(), True)
    mine, theirs = (torch.stack([_share(scores, right), _share(scores, ~right)], -1) for scores in (one, two))
    rest = [scores.masked_fill(right, -math.inf).log_softmax(-1).masked_fill(right, 0.0) for scores in (one, two)]
    among = (rest[1].exp().masked_fill(right, 0.0) * (rest[1] - rest[0])).sum(-1)
    return temperature**2 * (target * _kl(mine, theirs) + others * among).mean()


def _share(scores: Tensor, which: Tensor) -> Tensor:
    """The logarithm of the summed probability of some classes."""
    return torch.logsumexp(scores.masked_fill(~which, -math.inf), -1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over the last dimension, of logarithms of probabilities; a probability of 0 adds nothing."""
    chance = teacher.exp()
    return torch.where(chance > 0, chance * (teacher - student), 0.0).sum(-1)


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the Pearson correlation over the last dimension, the mean over the rows where the teacher varies (0 without any)."""
    one, two = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    varies = (teacher != teacher[..., :1]).any(-1)
    correlation = cosine_similarity(one, two, -1, eps=SMALLEST**2)
    return torch.where(varies, 1 - correlation, 0.0).sum() / varies.sum().clamp(min=1)


# Features -----------------------------------------------------------------------------------------------------------------------------


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 over all entries where the teacher is finite: 1 for a student that gives zeros."""
    finite = torch.isfinite(teacher)
    wanted = torch.where(finite, wide(teacher), 0.0)
    error = torch.where(finite, wide(student) - wanted, 0.0)
    return error.square().sum() / wanted.square().sum().clamp(min=SMALLEST**2)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of features of one width (Romero et al. 2015, FitNets, arXiv 1412.6550)."""
    return (wide(student) - wide(teacher)).square().mean()


def attention_maps(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """The squared distance between maps of where features are large: squares summed over the channels, a map a sample, of length 1
    (Zagoruyko & Komodakis 2017, arXiv 1612.03928, with squares instead of lengths of the differences, which have no gradient at 0).

    Args:
        student, teacher: [samples, positions, channels], of any numbers of channels.
        real: bool [samples, positions], False where a position is padding.
    """
    one, two = (wide(features).square().sum(-1) for features in (student, teacher))
    if real is not None:
        one, two = one * real, two * real
    return (normalize(one, dim=-1, eps=SMALLEST) - normalize(two, dim=-1, eps=SMALLEST)).square().sum(-1).mean()


# Relations between samples ------------------------------------------------------------------------------------------------------------


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber distance between the samples' distances from one another, each over their mean (Park et al. 2019, RKD-D, arXiv 1904.05068).

    Args:
        student, teacher: vectors [samples, width], of any widths; of a single sample there is nothing to compare.
    """
    one, two = (_distances(wide(vectors)) for vectors in (student, teacher))
    return smooth_l1_loss(one, two)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber distance between the cosines of the angles at each sample to each two others (Park et al. 2019, RKD-A, arXiv 1904.05068).

    Args:
        student, teacher: vectors [samples, width], of any widths. Memory: samples^3 numbers.
    """
    one, two = (_angles(wide(vectors)) for vectors in (student, teacher))
    return smooth_l1_loss(one, two)


def _distances(vectors: Tensor) -> Tensor:
    """[samples, samples], with a mean of 1 off the diagonal."""
    found = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    others = max(len(vectors) * (len(vectors) - 1), 1)
    return found / (found.sum() / others).clamp(min=SMALLEST)


def _angles(vectors: Tensor) -> Tensor:
    """[samples, samples, samples]: at the first one the cosine between the directions to the others; 0 where two are the same."""
    directions = normalize(vectors[None] - vectors[:, None], dim=-1, eps=SMALLEST)
    return directions @ directions.mT


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the cosine of vectors [..., width]."""
    return (1 - cosine_similarity(wide(student), wide(teacher), -1, eps=SMALLEST)).mean()


def similarity_matrix(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference between the matrices of all cosines in a batch (for sentence embeddings: Reimers & Gurevych 2019, arXiv
    1908.10084, whose users compare texts by cosines).

    Args:
        student, teacher: vectors [samples, width], of any widths.
    """
    one, two = (normalize(wide(vectors), dim=-1, eps=SMALLEST) for vectors in (student, teacher))
    return (one @ one.T - two @ two.T).square().mean()


def embedding(student: Tensor, teacher: Tensor, similarity: float = SIMILARITY) -> Tensor:
    """:func:`cosine_distance` plus ``similarity`` times :func:`similarity_matrix`, of vectors [samples, width] of one width."""
    return cosine_distance(student, teacher) + similarity * similarity_matrix(student, teacher)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference between the matrices of the samples' inner products, their rows of length 1 (Tung & Mori 2019, arXiv
    1907.09682).

    Args:
        student, teacher: [samples, ...], flattened; of any widths.
    """
    one, two = (_inner_products(wide(features).flatten(1)) for features in (student, teacher))
    return (one - two).square().mean()


def _inner_products(rows: Tensor) -> Tensor:
    return normalize(rows @ rows.T, dim=-1, eps=SMALLEST)


# Relations between positions ----------------------------------------------------------------------------------------------------------


def relations(student: Tensor, teacher: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of how positions relate to one another by one of queries, keys or values: softmax(x x^T / sqrt(width of a
    head)), the mean over samples, heads and positions (Wang et al. 2021, MiniLMv2, arXiv 2012.15828).

    Args:
        student, teacher: [samples, positions, width], the heads one behind the other; widths may differ, ``heads`` must divide both.
        real: bool [samples, positions], False where a position is padding, which then counts nowhere.
    """
    one, two = (_relation(wide(vectors), heads, real) for vectors in (student, teacher))
    apart = _kl(one, two).mean(1)
    return apart.mean() if real is None else (apart * real).sum() / real.sum().clamp(min=1)


def _relation(vectors: Tensor, heads: int, real: Tensor | None) -> Tensor:
    """Logarithms of [samples, heads, positions, positions]."""
    split = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.mT / math.sqrt(split.shape[-1])
    if real is not None:
        # A finite number, so that rows of padding alone have a gradient.
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
    return log_softmax(scores, -1)


# Which features belong together -------------------------------------------------------------------------------------------------------


def linear_cka(one: Tensor, two: Tensor) -> float:
    """How alike two sets of features are up to rotation and scale, 0 to 1 (Kornblith et al. 2019, linear CKA, arXiv 1905.00414).

    Args:
        one, two: the same observations in rows, [rows, width], of any widths. 0 where one of them is constant.
    """
    return float((kernel(one) * kernel(two)).sum())


def kernel(rows: Tensor) -> Tensor:
    """The products [rows, rows] of centred features [rows, width], of length 1: those of two sets multiply to their linear CKA."""
    centred = rows.double() - rows.double().mean(0)
    products = centred @ centred.T
    return products / products.norm().clamp(min=SMALLEST**2)


def regression(inputs: Tensor, targets: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias [outputs] with the least squared error of ``inputs @ weight.T + bias`` to the targets.

    Args:
        inputs, targets: [rows, width].
        ridge: added to the inputs' covariance, as a share of its mean diagonal.
    """
    x, y = inputs.double(), targets.double()
    middle, wanted = x.mean(0), y.mean(0)
    gram = (x - middle).T @ (x - middle)
    damping = ridge * gram.diagonal().mean().clamp(min=SMALLEST)
    weight = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype), (x - middle).T @ (y - wanted)).T
    return weight.to(inputs.dtype), (wanted - weight @ middle).to(inputs.dtype)
