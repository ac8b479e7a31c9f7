"""Losses of distillation against values computed by hand, closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import zscore
from torch import Tensor

from downsize.numerics.distillation import (
    attention_maps,
    cosine_distance,
    dist,
    dkd,
    embedding,
    hint,
    linear_cka,
    regression,
    relational_angle,
    relational_distance,
    relations,
    relative_error,
    similarity_matrix,
    similarity_preserving,
    soft_logits,
    standardized,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([0, 2, 1, 3, 2])
REAL = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])
LOSSES = {
    "soft_logits": (lambda s, t: soft_logits(s, t, 3.0), (5, 4)),
    "standardized": (lambda s, t: standardized(s, t, 2.0), (5, 4)),
    "dist": (lambda s, t: dist(s, t, 2.0), (5, 4)),
    "dkd": (lambda s, t: dkd(s, t, CLASSES, 2.0), (5, 4)),
    "relative_error": (relative_error, (5, 4)),
    "hint": (hint, (5, 4)),
    "attention_maps": (attention_maps, (3, 6, 4)),
    "attention_maps with padding": (lambda s, t: attention_maps(s, t, REAL), (3, 4, 2)),
    "relational_distance": (relational_distance, (5, 3)),
    "relational_angle": (relational_angle, (5, 3)),
    "cosine_distance": (cosine_distance, (5, 4)),
    "similarity_matrix": (similarity_matrix, (5, 4)),
    "embedding": (embedding, (5, 4)),
    "similarity_preserving": (similarity_preserving, (5, 2, 2)),
    "relations": (lambda s, t: relations(s, t, 2), (3, 4, 6)),
    "relations with padding": (lambda s, t: relations(s, t, 2, REAL), (3, 4, 6)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    loss, shape = LOSSES[name]
    student, teacher = random(*shape).requires_grad_(), random(*shape, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,), atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name):
    loss, shape = LOSSES[name]
    teacher = random(*shape, seed=1)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value.item()) < 1e-14 and gradient.abs().max() < 1e-14
    assert float(loss(random(*shape), teacher)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    loss, shape = LOSSES[name]
    student, teacher = random(*shape).bfloat16(), random(*shape, seed=1).bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(student.double(), teacher.double())), rel=1e-4)


# Class scores -------------------------------------------------------------------------------------------------------------------------


def test_soft_logits_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2) at temperature 2: KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64), torch.full((1, 2), 7.0).double()
    assert float(soft_logits(student, teacher, 2.0)) == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-12)


def test_soft_logits_at_high_temperature_are_half_the_squares_of_centred_scores():
    student, teacher = random(6, 5), random(6, 5, seed=1)
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert float(soft_logits(student, teacher, 1e4)) == pytest.approx(float(gap.square().mean() / 2), rel=1e-3)


def test_a_class_that_the_teacher_excludes_costs_nothing():
    teacher, student = torch.tensor([[0.0, 1.0, -math.inf]]).double(), torch.tensor([[0.0, 1.0, -math.inf]]).double().requires_grad_()
    value = soft_logits(student, teacher)
    assert value.item() == 0 and torch.autograd.grad(value, student)[0].isfinite().all()


def test_standardized_scores_are_those_of_scipy_and_know_neither_shift_nor_scale():
    student, teacher = random(6, 5), random(6, 5, seed=1)
    one, two = (torch.from_numpy(zscore(scores.numpy(), axis=1)) for scores in (student, teacher))
    assert float(standardized(student, teacher, 2.0)) == pytest.approx(10 * float(soft_logits(one, two, 2.0)), rel=1e-10)
    assert float(standardized(3 * teacher + 5, teacher)) == pytest.approx(0, abs=1e-12)


def test_standardized_scores_without_spread_or_with_excluded_classes_have_finite_gradients():
    teacher = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 2.0, 2.0]]).double()
    student = torch.tensor([[1.0, 0.0, -math.inf], [1.0, 1.0, 1.0]]).double().requires_grad_()
    value = standardized(student, teacher)
    # The first row: (1, -1) against (-1, 1) at temperature 2, where the probabilities are 1 / (1 + e) and e / (1 + e).
    p = 1 / (1 + math.e)
    assert value.item() == pytest.approx(10 * 4 * (1 - 2 * p) / 2, rel=1e-10)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_dist_is_one_minus_correlations_over_classes_and_over_samples():
    student, teacher = random(6, 5), random(6, 5, seed=1)
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    rows = [1 - torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(6)]
    columns = [1 - torch.corrcoef(torch.stack([p[:, i], q[:, i]]))[0, 1] for i in range(5)]
    assert float(dist(student, teacher, 2.0)) == pytest.approx(4 * float(sum(rows) / 6 + sum(columns) / 5), rel=1e-10)


def test_dist_does_not_see_what_keeps_the_order_of_two_classes():
    # With two classes every correlation over the classes is 1 or -1, and probabilities p and p / 2 correlate fully over the samples.
    p = torch.tensor([0.6, 0.7, 0.9]).double()
    teacher = torch.stack([p, 1 - p], 1).log()
    student = torch.stack([0.5 + (p - 0.5) / 2, 0.5 - (p - 0.5) / 2], 1).log()
    assert float(dist(student, teacher)) == pytest.approx(0, abs=1e-12)
    assert float(dist(-student, teacher)) == pytest.approx(4, abs=1e-12)


def test_dist_of_one_sample_has_its_classes_alone():
    student, teacher = random(1, 5), random(1, 5, seed=1)
    correlation = torch.corrcoef(torch.cat([student.softmax(1), teacher.softmax(1)]))[0, 1]
    assert float(dist(student, teacher)) == pytest.approx(float(1 - correlation), rel=1e-10)


def test_the_parts_of_dkd_add_up_to_hintons_loss():
    # KL = TCKD + (1 - p of the right class) NCKD, the identity that the paper begins with, sample by sample
    student, teacher = random(5, 4), random(5, 4, seed=1)
    for i in range(5):
        one, two, right = student[i : i + 1], teacher[i : i + 1], CLASSES[i : i + 1]
        doubt = 1 - float((two / 2).softmax(1)[0, right])
        assert float(dkd(one, two, right, 2.0, 1.0, doubt)) == pytest.approx(float(soft_logits(one, two, 2.0)), rel=1e-10)


def test_dkd_by_hand():
    student, teacher = torch.zeros(1, 3).double(), torch.tensor([[math.log(2.0), math.log(3.0), 0.0]], dtype=torch.float64)
    # teacher (1/3, 1/2, 1/6), student thirds, right class 1: TCKD of (1/2, 1/2) to (1/3, 2/3); NCKD of (2/3, 1/3) to (1/2, 1/2)
    target = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    others = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert float(dkd(student, teacher, torch.tensor([1]), 1.0, 1.0, 8.0)) == pytest.approx(target + 8 * others, rel=1e-10)


def test_more_leading_dimensions_are_more_samples():
    student, teacher, classes = random(6, 5), random(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    two, four = student.reshape(2, 3, 5), teacher.reshape(2, 3, 5)
    assert torch.allclose(soft_logits(two, four), soft_logits(student, teacher), rtol=1e-12)
    assert torch.allclose(dist(two, four), dist(student, teacher), rtol=1e-12)
    assert torch.allclose(dkd(two, four, classes.reshape(2, 3)), dkd(student, teacher, classes), rtol=1e-12)


# Features and relations ---------------------------------------------------------------------------------------------------------------


def test_errors_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert float(hint(student, teacher)) == 4.0
    assert float(relative_error(student, teacher)) == pytest.approx(8 / 25)
    assert float(relative_error(torch.zeros(1, 2), teacher)) == 1.0
    assert float(relative_error(torch.tensor([[1.0, 9.0]]), torch.tensor([[2.0, math.inf]]))) == pytest.approx(0.25)


def test_attention_maps_by_hand():
    # squares summed over channels: (9, 16) and (1, 0); of length 1: over sqrt(337), and (1, 0)
    student, teacher = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]).double(), torch.tensor([[[1.0], [0.0]]]).double()
    first, second = 9 / math.sqrt(337), 16 / math.sqrt(337)
    assert float(attention_maps(student, teacher)) == pytest.approx((first - 1) ** 2 + second**2, rel=1e-12)
    assert float(attention_maps(student, 5 * student.flip(2))) == pytest.approx(0, abs=1e-14)


def test_relational_distances_by_hand():
    # distances 3, 4, 5 over their mean 4; 1, 1, 2 over 4/3; half the squares of the differences, six of nine entries
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()
    teacher = torch.tensor([[0.0], [1.0], [-1.0]]).double()
    gaps = [3 / 4 - 3 / 4, 1 - 3 / 4, 5 / 4 - 6 / 4]
    assert float(relational_distance(student, teacher)) == pytest.approx(2 * sum(gap**2 / 2 for gap in gaps) / 9, rel=1e-12)


def test_relational_angles_by_hand():
    # A right triangle with legs 3 and 4 against a straight line: at each corner the cosines to itself (1, twice) and between the others.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()
    teacher = torch.tensor([[0.0], [1.0], [-1.0]]).double()
    gaps = [0 - -1.0, 3 / 5 - 1.0, 4 / 5 - 1.0]
    assert float(relational_angle(student, teacher)) == pytest.approx(2 * sum(gap**2 / 2 for gap in gaps) / 27, rel=1e-12)


def test_relations_between_samples_do_not_see_scale_and_rotation():
    teacher, (turn, _) = random(6, 4), torch.linalg.qr(random(4, 4, seed=2))
    student = 3 * teacher @ turn
    for loss in (relational_distance, relational_angle, similarity_matrix, similarity_preserving):
        assert float(loss(student, teacher)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_distance(student, teacher)) > 0.1


def test_one_sample_has_no_relations():
    student, teacher = random(1, 4).requires_grad_(), random(1, 4, seed=1)
    for loss in (relational_distance, relational_angle, similarity_matrix, similarity_preserving):
        value = loss(student, teacher)
        assert value.item() == pytest.approx(0, abs=1e-12) and torch.autograd.grad(value, student)[0].isfinite().all()


def test_equal_samples_have_finite_gradients():
    student, teacher = torch.ones(3, 4, dtype=torch.float64).requires_grad_(), random(3, 4)
    for name, (loss, _) in LOSSES.items():
        if name in ("relational_distance", "relational_angle", "similarity_matrix", "embedding", "relative_error"):
            assert torch.autograd.grad(loss(student, teacher), student)[0].isfinite().all()


def test_cosines_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([[0.0, 2.0], [3.0, 3.0]]).double()
    assert float(cosine_distance(student, teacher)) == pytest.approx(0.5, rel=1e-12)
    # the two samples' cosine is 1/sqrt(2) in both
    assert float(similarity_matrix(student, teacher)) == pytest.approx(0, abs=1e-14)
    other = torch.tensor([[0.0, 2.0], [3.0, 0.0]]).double()
    assert float(similarity_matrix(student, other)) == pytest.approx(2 * 0.5 / 4, rel=1e-12)
    assert float(embedding(student, other, 2.0)) == pytest.approx(1 - (0 + 1 / math.sqrt(2)) / 2 + 2 * 0.25, rel=1e-12)


def test_inner_products_by_hand():
    # G = [[1, 1], [1, 2]] and the unit matrix: rows over sqrt(2) and sqrt(5)
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), torch.eye(2).double()
    rows = [(1 / math.sqrt(2), 1 / math.sqrt(2)), (1 / math.sqrt(5), 2 / math.sqrt(5))]
    expected = sum((rows[i][j] - float(i == j)) ** 2 for i in range(2) for j in range(2)) / 4
    assert float(similarity_preserving(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_relations_between_positions_by_hand():
    # One head, one channel of width 1: scores x_i x_j. Teacher zeros: halves. Student (1, 0): the first row (e, 1) / (e + 1), the second halves.
    student, teacher = torch.tensor([[[1.0], [0.0]]]).double(), torch.zeros(1, 2, 1).double()
    first = 0.5 * math.log(0.5 * (math.e + 1) / math.e) + 0.5 * math.log(0.5 * (math.e + 1))
    assert float(relations(student, teacher, 1)) == pytest.approx(first / 2, rel=1e-10)


def test_relations_are_each_heads_own():
    student, teacher = random(2, 4, 6), random(2, 4, 6, seed=1)
    parts = [relations(student[..., i : i + 2], teacher[..., i : i + 2], 1) for i in (0, 2, 4)]
    assert float(relations(student, teacher, 3)) == pytest.approx(float(sum(parts)) / 3, rel=1e-12)  # pyright: ignore[reportArgumentType]


def test_relations_of_other_widths_have_heads_of_other_sizes():
    teacher = random(2, 4, 4, seed=1)
    # Twice as many channels, each pair of which holds one of the teacher's: its products are scaled by the root of the head's width.
    student = teacher.repeat_interleave(2, -1) * 2**-0.25
    assert float(relations(student, teacher, 2)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [lambda s, t, r: relations(s, t, 2, r), attention_maps])
def test_padding_counts_nowhere(loss):
    student, teacher = random(3, 4, 6), random(3, 4, 6, seed=1)
    value = loss(student, teacher, REAL)
    student[~REAL], teacher[~REAL] = 100.0, -50.0
    assert float(loss(student, teacher, REAL)) == pytest.approx(float(value), rel=1e-12)
    alone = [loss(student[i : i + 1, REAL[i]], teacher[i : i + 1, REAL[i]], None) for i in range(3)]
    counts = REAL.sum(1).double() if loss is not attention_maps else torch.ones(3)
    assert float(value) == pytest.approx(float((torch.stack(alone) * counts).sum() / counts.sum()), rel=1e-10)


# Which features belong together -------------------------------------------------------------------------------------------------------


def test_cka_by_hand():
    one, two = torch.tensor([[1.0], [-1.0], [0.0], [0.0]]), torch.tensor([[1.0], [0.0], [-1.0], [0.0]])
    # centred already: squared inner product 1, over squared lengths 2 each
    assert linear_cka(one, two) == pytest.approx(0.25, rel=1e-12)
    assert linear_cka(one, torch.ones(4, 1)) == 0.0


def test_cka_is_one_for_rotated_scaled_and_shifted_features():
    one, (turn, _) = random(20, 5), torch.linalg.qr(random(5, 5, seed=2))
    assert linear_cka(one, 7 * one @ turn + 3) == pytest.approx(1, rel=1e-12)
    assert linear_cka(one, random(20, 5, seed=3)) < 0.6


def test_regression_finds_the_layer_that_made_the_targets():
    x, weight, bias = random(50, 4), random(3, 4, seed=1), random(3, seed=2)
    found, shift = regression(x, x @ weight.T + bias, ridge=0.0)
    assert torch.allclose(found, weight, atol=1e-10) and torch.allclose(shift, bias, atol=1e-10)


def test_regression_with_fewer_rows_than_columns_has_the_ridges_closed_form():
    x, y = random(3, 6), random(3, 2, seed=1)
    centred, wanted = x - x.mean(0), y - y.mean(0)
    damping = 0.1 * (centred.T @ centred).diagonal().mean()
    # the same by the kernel instead of the covariance
    expected = (centred.T @ torch.linalg.inv(centred @ centred.T + damping * torch.eye(3)) @ wanted).T
    weight, bias = regression(x, y, ridge=0.1)
    assert torch.allclose(weight, expected, atol=1e-10) and torch.allclose(bias, y.mean(0) - expected @ x.mean(0), atol=1e-10)
