"""Scores of units against numbers worked out by hand, and against plain loops over the definitions."""

from __future__ import annotations

import pytest
import torch

from downsize.numerics.importance import energy, geometric_median, magnitude, normalise, random, scale, taylor

# Two units: the rows 0 and 2 of one tensor with the first bias, the row 1 with the second; the columns of a reader the other way round.
PRODUCER = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, 2.0]])
BIAS = torch.tensor([4.0, -1.0])
READER = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
PARTS = [(PRODUCER, 0, torch.tensor([0, 1, 0])), (BIAS, 0, torch.tensor([0, 1])), (READER, 1, torch.tensor([1, 0]))]


def equals(scores: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_magnitude_is_the_norm_of_all_that_a_unit_has():
    equals(magnitude(PARTS, 2, 1), 1 + 2 + 2 + 4 + 1, 3 + 1 + 2)
    equals(magnitude(PARTS, 2, 2), (1 + 4 + 4 + 16 + 1) ** 0.5, (9 + 1 + 4) ** 0.5)
    equals(magnitude([], 2), 0, 0)


def test_what_belongs_to_no_unit_counts_for_none():
    equals(magnitude([(PRODUCER, 0, torch.tensor([-1, 1, -1]))], 3, 1), 0, 3, 0)
    equals(energy(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-1, 1, 1]), 2), 0, 6)


def test_scale_sums_the_factors_of_batch_normalisations():
    equals(scale([(torch.tensor([-2.0, 0.5]), 0, torch.tensor([0, 1])), (torch.tensor([1.0, 3.0]), 0, torch.tensor([1, 0]))], 2), 5, 1.5)


def test_geometric_median_is_the_sum_of_distances():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    equals(geometric_median([(points, 0, torch.arange(3))], 3), 15, 10, 15)
    # The same points, one coordinate from each of two tensors, the second along its last dimension.
    split = [(points[:, :1], 0, torch.arange(3)), (points[:, 1:].T.contiguous(), 1, torch.arange(3))]
    equals(geometric_median(split, 3), 15, 10, 15)
    equals(geometric_median([], 2), 0, 0)


def test_geometric_median_of_units_with_several_rows_by_the_plain_double_loop():
    tensor = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1))
    unit = torch.tensor([2, 0, -1, 0, 2, 1])
    zeros = torch.zeros(2, 3)
    vectors = [torch.stack([tensor[1], tensor[3]]), torch.stack([tensor[5], zeros]), torch.stack([tensor[0], tensor[4]])]
    expected = [sum(float((one - two).double().norm()) for two in vectors) for one in vectors]
    torch.testing.assert_close(geometric_median([(tensor, 0, unit)], 3), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_twins_have_no_distance():
    points = torch.full((2, 100), 1000.1)
    equals(geometric_median([(points, 0, torch.arange(2))], 2), 0, 0)


def test_taylor_squares_the_sum_over_all_parts():
    gradients = [torch.tensor([[1.0, 1.0], [2.0, 5.0], [7.0, -1.0]]), torch.tensor([0.5, 3.0]), torch.ones(3, 2)]
    equals(taylor(PARTS, gradients, 2), ((1 - 2 - 2) + 2 + 1) ** 2, (6 - 3 + 2) ** 2)


def test_taylor_is_the_loss_without_the_unit_to_first_order():
    torch.manual_seed(2)
    weight, x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 20, dtype=torch.float64)
    loss = (weight @ x).sum(0).tanh().mean()
    loss.backward()
    assert weight.grad is not None
    step = 1e-5
    for row in range(4):
        smaller = weight.detach().clone()
        smaller[row] *= 1 - step
        change = float(((smaller @ x).sum(0).tanh().mean() - loss.detach()) / step)
        score = taylor([(weight, 0, torch.arange(4))], [weight.grad], 4)[row]
        assert float(score) == pytest.approx(change**2, rel=1e-3)


def test_energy_is_the_diagonal_of_the_gram_matrix():
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    equals(energy((x @ x.T).diagonal(), torch.tensor([0, 1, 0]), 2), 1 + 4 + 1 + 1, 9)


def test_random_scores_are_repeatable_and_differ_by_seed():
    assert torch.equal(random(50, 3), random(50, 3)) and not torch.equal(random(50, 3), random(50, 4))
    assert float(random(1000, 0).min()) >= 0 and float(random(1000, 0).max()) < 1 and len(random(1000, 0).unique()) == 1000


def test_normalised_scores_have_the_mean_one():
    equals(normalise(torch.tensor([1.0, 3.0], dtype=torch.float64)), 0.5, 1.5)
    equals(normalise(torch.zeros(2, dtype=torch.float64)), 0, 0)
    assert normalise(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("score", [magnitude, scale, geometric_median])
def test_units_that_do_not_fit_are_refused(score):
    with pytest.raises(ValueError, match="expected units below 2"):
        score([(PRODUCER, 0, torch.tensor([0, 1, 2]))], 2)
    with pytest.raises(ValueError, match="expected one an index"):
        score([(PRODUCER, 0, torch.tensor([0, 1]))], 2)


def test_other_norms_are_refused():
    with pytest.raises(ValueError, match="expected 1 or 2"):
        magnitude(PARTS, 2, 3)
