"""Agreement and intervals against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import accuracy_score
from sklearn.metrics.pairwise import paired_cosine_distances

from downsize.errors import ArtifactError
from downsize.numerics.agreement import Comparison, as_array, bootstrap, compare, cosines, count_not_finite


def two_logits(rows: int = 40, columns: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=(rows, columns)).astype(np.float32) * 3
    return reference, reference + generator.normal(size=reference.shape).astype(np.float32)


def test_logits_agree_with_scipy_and_sklearn():
    reference, other = two_logits()
    found = compare([reference], [other])
    left, right = special.softmax(reference.astype(float), axis=1), special.softmax(other.astype(float), axis=1)
    assert found.samples == 40
    assert found.top1 == accuracy_score(reference.argmax(1), other.argmax(1)) < 1
    assert found.kl == pytest.approx(stats.entropy(left, right, axis=1).mean(), rel=1e-9)
    assert found.cosine == pytest.approx(1 - paired_cosine_distances(reference, other).mean(), rel=1e-6)
    assert found.relative_error == pytest.approx(np.linalg.norm(other - reference) / np.linalg.norm(reference), rel=1e-6)


def test_probabilities_are_not_put_through_softmax_again():
    left, right = (special.softmax(logits.astype(float), axis=1) for logits in two_logits())
    assert compare([left], [right]).kl == pytest.approx(stats.entropy(left, right, axis=1).mean(), rel=1e-9)


def test_a_probability_of_zero_leaves_the_divergence_finite():
    found = compare([np.array([[0.5, 0.5]])], [np.array([[1.0, 0.0]])])
    assert found.kl == pytest.approx(0.5 * np.log(0.5 / 1.0) + 0.5 * np.log(0.5 / 1e-12), rel=1e-9)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))
def test_a_model_agrees_with_itself_exactly(rows: int, columns: int, seed: int):
    outputs = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    found = compare([outputs], [outputs.copy()])
    assert (found.cosine, found.relative_error) == (1.0, 0.0)
    assert (found.top1, found.kl) == ((1.0, 0.0) if columns > 1 else (None, None))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_batches_give_what_one_batch_gives(sizes: list[int], seed: int):
    reference, other = two_logits(sum(sizes), seed=seed)
    streaming = Comparison()
    cuts = np.cumsum(sizes)[:-1]
    for left, right in zip(np.split(reference, cuts), np.split(other, cuts), strict=True):
        streaming.add([left], [right])
    one, whole = streaming.agreement(), compare([reference], [other])
    assert (one.samples, one.top1) == (whole.samples, whole.top1)
    assert [one.relative_error, one.cosine, one.kl] == pytest.approx([whole.relative_error, whole.cosine, whole.kl], rel=1e-6)


def test_several_outputs_join_in_the_errors_and_the_first_decides_the_classes():
    reference, other = two_logits()
    maps = np.random.default_rng(1).normal(size=(40, 2, 5, 5)).astype(np.float32)
    found = compare([reference, maps], [other, maps + 1])
    joined = [np.concatenate([a, b.reshape(40, -1)], 1) for a, b in ((reference, maps), (other, maps + 1))]
    assert found.cosine == pytest.approx(1 - paired_cosine_distances(*joined).mean(), rel=1e-6)
    assert found.relative_error == pytest.approx(np.linalg.norm(joined[1] - joined[0]) / np.linalg.norm(joined[0]), rel=1e-6)
    assert found.top1 == compare([reference], [other]).top1


def test_an_output_without_samples_counts_in_the_error_only():
    reference, other = two_logits()
    alone = compare([reference], [other])
    found = compare([reference, np.float32(100)], [other, np.float32(101)])
    assert (found.samples, found.cosine) == (40, alone.cosine)
    square = (alone.relative_error * np.linalg.norm(reference)) ** 2 + 1
    assert found.relative_error == pytest.approx((square / (np.linalg.norm(reference) ** 2 + 100**2)) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    "outputs",
    [
        np.eye(4, 8, dtype=np.float32)[:, ::-1] * [[1], [-1], [1], [1]],  # unit vectors: embeddings
        np.arange(12).reshape(4, 3),  # whole numbers
        np.ones((4, 1), np.float32),  # one column
        np.ones((4, 3, 2), np.float32),  # not a table
    ],
)
def test_only_class_scores_have_classes(outputs: np.ndarray):
    found = compare([outputs], [outputs])
    assert (found.top1, found.kl) == (None, None)


def test_zero_vectors():
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    assert (cosines([zero], [zero])[0], cosines([zero], [one])[0], cosines([one], [zero])[0]) == (1, 0, 0)
    assert compare([zero], [zero]).relative_error == 0
    assert compare([zero], [one]).relative_error == float("inf")


def test_a_single_number_a_sample_is_compared_by_its_size_too():
    """Its cosine would be 1 wherever the signs agree."""
    reference, other = np.array([10.0, 10.0, -1.0, 0.0, 0.0, 3.0]), np.array([10.0, 5.0, 1.0, 0.0, 2.0, 3.03])
    expected = [1, 0.8, -1, 1, 0, 2 * 3 * 3.03 / (9 + 3.03**2)]
    for shape in ((6,), (6, 1), (6, 1, 1)):
        assert np.allclose(cosines([reference.reshape(shape)], [other.reshape(shape)]), expected, rtol=1e-12)
    assert abs(expected[-1] - (1 - 0.01**2 / 2)) < 1e-6


def test_unsigned_numbers_do_not_wrap():
    assert compare([np.array([[1, 2]], np.uint8)], [np.array([[2, 1]], np.uint8)]).relative_error == pytest.approx((2 / 5) ** 0.5)


def test_torch_tensors_are_taken_too():
    reference, other = two_logits()
    assert compare([torch.tensor(reference, requires_grad=True)], [torch.tensor(other)]) == compare([reference], [other])
    assert as_array(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([np.ones((4, 3))], r"output 0 has the shape \[4, 3\]; expected \[4, 2\]"),
        ([np.ones((4, 2)), np.ones((4, 2))], "2 outputs came; expected the 1"),
        ([np.array([[np.nan, np.inf]] * 4)], "output 0 has 8 values that are NaN or infinite in batch 1"),
    ],
)
def test_bad_outputs_are_refused(other: list[np.ndarray], words: str):
    with pytest.raises(ArtifactError, match=words):
        compare([np.ones((4, 2))], other)


def test_nothing_to_compare_is_refused():
    with pytest.raises(ArtifactError, match="no samples"):
        Comparison().agreement()


def test_count_not_finite():
    assert count_not_finite(np.array([1.0, np.nan, -np.inf])) == 2
    assert count_not_finite(torch.tensor([1.0, float("nan")])) == 1
    assert count_not_finite(np.array([1, 2])) == 0


def test_bootstrap_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).exponential(size=50)
    found = bootstrap(lambda drawn: [values[drawn].mean(), np.median(values[drawn])], len(values), samples=400, seed=7)
    for statistic, interval in zip((np.mean, np.median), found or [], strict=True):
        expected = stats.bootstrap((values,), statistic, n_resamples=400, method="percentile", rng=np.random.default_rng(7)).confidence_interval
        assert interval == pytest.approx(tuple(expected), rel=1e-12)


def test_bootstrap_without_enough_gives_no_interval():
    assert bootstrap(lambda drawn: [0.0], 1) is None
    assert bootstrap(lambda drawn: [np.nan if 0 in drawn else 1.0], 20) is None  # 64 % of the draws have unit 0
    assert bootstrap(lambda drawn: [np.nan if (drawn == drawn[0]).all() else 1.0], 4) == [(1.0, 1.0)]  # 1.6 % are one unit only
