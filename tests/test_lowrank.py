"""Low rank of matrices: against singular values of the outputs themselves, least squares, perturbation, planted ranks and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from downsize.numerics.lowrank import Spectrum, by_frequency, energy_rank, evbmf_rank, spectrum

SHAPES = [(6, 9), (14, 5), (8, 8)]


def inputs(columns: int, positions: int = 200, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [columns, positions] of uneven size, far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, columns, dtype=torch.float64)
    return mixed @ torch.randn(columns, positions, generator=generator, dtype=torch.float64) + 3 * torch.randn(columns, 1, generator=generator)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([x, x.new_ones(1, x.shape[1])])
    return x @ x.T


def weight_of(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_error(made: Spectrum, rank: int, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Measured: the squared error of the factors' outputs, the shift added, as a part of the centred outputs'."""
    first, second, shift = made.factors(rank)
    y = weight @ x
    return float((y - second @ (first @ x) - shift[:, None]).square().sum() / (y - y.mean(1, keepdim=True)).square().sum())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_errors_are_the_discarded_singular_values_and_the_measured_error(rows, columns):
    weight, x = weight_of(rows, columns), inputs(columns)
    made = spectrum(weight, gram_of(x))
    y = (weight @ x - (weight @ x).mean(1, keepdim=True)).numpy()
    singular = np.linalg.svd(y, compute_uv=False)
    assert made.energy == pytest.approx(float(np.square(y).sum()))
    np.testing.assert_allclose(made.values.numpy(), singular[: len(made.values)], rtol=1e-6, atol=1e-6 * singular[0])
    for rank in range(len(made.values) + 1):
        discarded = np.square(singular[rank:]).sum() / np.square(singular).sum()
        assert made.error(rank) == pytest.approx(discarded, rel=1e-6, abs=1e-12)
        assert output_error(made, rank, weight, x) == pytest.approx(discarded, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damping_moves_directions_and_the_errors_stay_the_measured_ones(damping):
    weight, x = weight_of(6, 9), inputs(9)
    made, best = spectrum(weight, gram_of(x), damping), spectrum(weight, gram_of(x))
    for rank in range(1, 6):
        assert made.error(rank) == pytest.approx(output_error(made, rank, weight, x), rel=1e-9)
        assert made.error(rank) >= best.error(rank) * (1 - 1e-9)
    assert made.error(3) > best.error(3) * (1 + 1e-6)
    assert bool((made.errors.diff() <= 0).all())


def test_no_factors_nearby_are_better():
    weight, x = weight_of(6, 9), inputs(9)
    made = spectrum(weight, gram_of(x))
    first, second, shift = made.factors(3)
    y, generator = weight @ x, torch.Generator().manual_seed(5)
    least = float((y - second @ first @ x - shift[:, None]).square().sum())
    for size, _ in itertools.product((1e-1, 1e-2, 1e-3), range(20)):
        a, b, c = (
            part + size * part.abs().mean() * torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in (first, second, shift)
        )
        assert float((y - b @ a @ x - c[:, None]).square().sum()) > least


def test_the_best_of_all_choices_of_one_direction_in_two_dimensions():
    """Brute force: every direction of the output kept alone, the best inner factor and shift for it."""
    weight, x = weight_of(2, 4), inputs(4)
    y = weight @ x
    y = y - y.mean(1, keepdim=True)
    angles = torch.linspace(0, torch.pi, 20001, dtype=torch.float64)
    across = torch.stack([-angles.sin(), angles.cos()], 1)
    lost = (across @ y).square().sum(1) / y.square().sum()
    assert spectrum(weight, gram_of(x)).error(1) == pytest.approx(float(lost.min()), rel=1e-5)


def test_data_beat_the_weight_alone():
    weight, x = weight_of(12, 12), inputs(12)
    made, plain = spectrum(weight, gram_of(x)), spectrum(weight)
    for rank in (2, 4, 8):
        assert output_error(made, rank, weight, x) < 0.7 * output_error(plain, rank, weight, x)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_without_data_it_is_the_singular_value_decomposition(rows, columns):
    weight = weight_of(rows, columns)
    made = spectrum(weight)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(made.values.numpy(), values, rtol=1e-6)
    first, second, shift = made.factors(3)
    np.testing.assert_allclose((second @ first).numpy(), left[:, :3] * values[:3] @ right[:3], atol=1e-7)
    assert not shift.any()
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("positions", [2, 4, 300])
def test_full_rank_is_the_weight_even_where_few_samples_leave_it_open(rows, columns, positions):
    weight, x = weight_of(rows, columns), inputs(columns, positions)
    x[1] = 2.5  # constant
    made = spectrum(weight, gram_of(x))
    first, second, shift = made.factors(min(rows, columns))
    torch.testing.assert_close(second @ first, weight, rtol=0, atol=1e-8)
    assert shift.abs().max() < 1e-8
    enough = min(rows, columns, positions - 1)
    assert output_error(made, enough, weight, x) < 1e-9


def test_factors_are_balanced_in_what_they_give():
    weight, x = weight_of(6, 9), inputs(9)
    first, second, _ = spectrum(weight, gram_of(x)).factors(4)
    inner = first @ (x - x.mean(1, keepdim=True))
    torch.testing.assert_close(inner.square().mean(1).sqrt(), second.norm(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(inner @ inner.T / 200, torch.diag(inner.square().mean(1)), rtol=0, atol=1e-6)


def test_a_shared_first_factor_serves_stacked_weights_by_importance():
    """Of two matrices with the same input one made small: stacked as they are it is lost, by its own energy it is not."""
    one, two, x = weight_of(5, 8, 1), 1e-3 * weight_of(5, 8, 2), inputs(8)
    energy = [spectrum(part, gram_of(x)).energy for part in (one, two)]
    stacked = torch.cat([one, two])
    alike = spectrum(stacked, gram_of(x), importance=torch.tensor([1 / energy[0]] * 5 + [1 / energy[1]] * 5))
    errors = {}
    for name, made in (("plain", spectrum(stacked, gram_of(x))), ("alike", alike)):
        first, second, shift = made.factors(4)
        missed = [
            (part @ x - rows @ (first @ x) - b[:, None]).square().sum()
            for part, rows, b in zip((one, two), second.split(5), shift.split(5), strict=True)
        ]
        errors[name] = [float(part) / whole for part, whole in zip(missed, energy, strict=True)]
    assert errors["alike"][1] < errors["plain"][1] / 2
    assert sum(errors["alike"]) / 2 == pytest.approx(alike.error(4), rel=1e-6)
    assert sum(errors["alike"]) < sum(errors["plain"])


@pytest.mark.parametrize("bad", [torch.eye(9), torch.zeros(10, 10)])
def test_grams_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="Gram matrix"):
        spectrum(weight_of(3, 9), bad)


def test_ranks_and_importances_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected 0 to 3"):
        spectrum(weight_of(3, 9)).factors(4)
    with pytest.raises(ValueError, match="importance"):
        spectrum(weight_of(3, 9), importance=torch.zeros(3))


def test_values_that_are_not_finite_are_refused():
    weight, gram = weight_of(3, 9), gram_of(inputs(9))
    for bad_weight, bad_gram in ((weight.clone(), None), (weight, gram.clone())):
        (bad_weight if bad_gram is None else bad_gram)[0, 1] = torch.nan
        with pytest.raises(ValueError, match=r"1 of .* values are NaN or infinite"):
            spectrum(bad_weight, bad_gram)


def test_rounding_of_a_gram_matrix_in_single_precision_is_borne():
    """Inputs with a mean 30 times their spread, summed in float32: the covariance that is left is a little off, and not quite positive."""
    weight, x = weight_of(12, 20), inputs(20, 1000)
    x = x / x.std(1, keepdim=True) + 30
    x[5:10] = x[:5]
    rows = torch.cat([x, torch.ones(1, 1000)]).float()
    made, exact = spectrum(weight, (rows @ rows.T).double()), spectrum(weight, gram_of(x))
    for rank in (3, 6, 9):
        assert output_error(made, rank, weight, x) == pytest.approx(exact.error(rank), rel=0.02)


# Embeddings ------------------------------------------------------------------------------------------------------------------------


def test_a_table_by_frequency_is_the_layer_on_its_own_one_hot_inputs():
    table, counts = weight_of(40, 6), torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(0))
    made = by_frequency(table, counts)
    x = torch.eye(40, dtype=torch.float64).repeat_interleave(counts, dim=1)
    told = spectrum(table.T, gram_of(x))
    torch.testing.assert_close(made.errors, told.errors, rtol=1e-6, atol=1e-12)
    for rank in (1, 3, 5):
        first, second, shift = made.factors(rank)
        small = first.T  # [40, rank]
        error = (counts[:, None] * (small @ second.T + shift - table).square()).sum() / made.energy
        assert float(error) == pytest.approx(told.error(rank), rel=1e-6)
        torch.testing.assert_close(second @ first, torch.mm(*reversed(told.factors(rank)[:2])), rtol=0, atol=1e-6)


def test_frequent_rows_are_nearer_and_unseen_ones_are_not_lost():
    table = weight_of(200, 16)
    counts = torch.zeros(200)
    counts[:20] = 100
    counts[20:50] = 1
    first, second, shift = by_frequency(table, counts).factors(8)
    missed = (first.T @ second.T + shift - table).square().sum(1)
    assert missed[:20].mean() < 0.5 * missed[20:].mean()
    assert missed[50:].mean() < table[50:].square().sum(1).mean()
    first, second, shift = by_frequency(table, counts).factors(16)
    torch.testing.assert_close(first.T @ second.T + shift, table, rtol=0, atol=1e-8)
    torch.testing.assert_close(by_frequency(table, torch.zeros(200)).errors, by_frequency(table, torch.ones(200)).errors)


def test_unseen_rows_share_as_many_occurrences_as_there_are_rows_seen_once():
    counts = torch.tensor([5.0, 1, 1, 0, 0, 0, 0])
    told = by_frequency(weight_of(7, 3), torch.tensor([5.0, 1, 1, 0.5, 0.5, 0.5, 0.5]))
    torch.testing.assert_close(by_frequency(weight_of(7, 3), counts).errors, told.errors)
    with pytest.raises(ValueError, match="none below 0"):
        by_frequency(weight_of(7, 3), counts - 1)


# Ranks -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (0.6, 1), (16 / 26, 1), (0.7, 2), (25 / 26, 2), (0.99, 3), (1.0, 3)])
def test_energy_rank(share, rank):
    assert energy_rank(torch.tensor([4.0, 3.0, 1.0, 0.0]), share) == rank


def test_energy_rank_of_nothing():
    assert energy_rank(torch.zeros(4), 0.9) == 0


@pytest.mark.parametrize("planted", [0, 1, 5, 20])
@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (80, 80)])
@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_evbmf_finds_a_planted_rank_beneath_noise(planted, shape, noise):
    generator = torch.Generator().manual_seed(planted)
    signal = torch.randn(shape[0], planted, generator=generator) @ torch.randn(planted, shape[1], generator=generator)
    assert evbmf_rank(signal + noise * torch.randn(shape, generator=generator)) == planted


def test_evbmf_drops_what_noise_hides():
    """A direction below the edge of the noise's own singular values (Marchenko and Pastur 1967) cannot be told; one well above can."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 2, generator=generator))[0] for n in (100, 400))
    edge = 100**0.5 + 400**0.5
    found = [evbmf_rank(left * torch.tensor([3 * edge, weak * edge]) @ right.T + torch.randn(100, 400, generator=generator)) for weak in (0.3, 2.0)]
    assert found == [1, 2]


def test_evbmf_of_no_noise_and_of_nothing():
    exact = torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 50, dtype=torch.float64)
    assert (evbmf_rank(exact), evbmf_rank(torch.zeros(5, 7)), evbmf_rank(torch.zeros(0, 7))) == (4, 0, 0)
