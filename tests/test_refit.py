"""Refits from moments against numpy's least squares on the samples themselves, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from downsize.numerics import refit as module
from downsize.numerics.refit import Moments, best_refit, refit, residual


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    made = Moments.zero(x.shape[0], y.shape[1], x.shape[1])
    made.add(x, y)
    return made


def problem(seed: int, groups: int, rows: int, columns: int, samples: int, noise: float = 0.1):
    """Inputs with means and uneven sizes, targets nearly linear in them, and an old weight and bias that are off."""
    mix = draw(seed, groups, columns, columns)
    x = mix @ draw(seed + 1, groups, columns, samples) + 2 * draw(seed + 2, groups, columns, 1)
    true, shift = draw(seed + 3, groups, rows, columns), draw(seed + 4, groups, rows)
    y = true @ x + shift[:, :, None] + noise * draw(seed + 5, groups, rows, samples)
    return x, y, true + 0.5 * draw(seed + 6, groups, rows, columns), shift + draw(seed + 7, groups, rows)


def by_numpy(x, y, weight, bias, ridge, own=False, support=None):
    """One group: ridge regression towards the old weight as least squares with further samples, on the columns of each row's support."""
    x, y, weight = x.numpy(), y.numpy(), weight.numpy()
    deviations = np.square(x - x.mean(1, keepdims=True)).sum(1) if bias is not None else np.square(x).sum(1)
    strength = ridge * (deviations if own else np.full(len(x), deviations[deviations > 0].mean()))
    new, shift = np.zeros_like(weight), np.zeros(len(weight))
    for row in range(len(weight)):
        used = np.ones(len(x), bool) if support is None else support[row].numpy()
        ones = np.ones((1, x.shape[1])) if bias is not None else np.zeros((0, x.shape[1]))
        tall = np.concatenate([x[used], ones]).T
        pull = np.concatenate([np.diag(np.sqrt(strength[used])), np.zeros((int(used.sum()), len(ones)))], 1)
        wanted = np.concatenate([y[row], np.sqrt(strength[used]) * weight[row, used]])
        solved = np.linalg.lstsq(np.concatenate([tall, pull]), wanted, rcond=None)[0]
        new[row, used] = solved[: int(used.sum())]
        shift[row] = solved[-1] if bias is not None else 0
    return new, shift


def relative(x, y, weight, bias) -> float:
    """The definition of the residual, on the samples."""
    missed = y - weight @ x - (0 if bias is None else bias[:, :, None])
    return float(missed.square().sum() / (y - y.mean(2, keepdim=True)).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_the_sums_over_all_positions(dtype):
    x, y = draw(0, 3, 4, 10_000).to(dtype) + 1000, draw(1, 3, 2, 10_000).to(dtype) - 300
    moments = Moments.zero(3, 2, 4)
    for part in (slice(0, 1), slice(1, 9000), slice(9000, 10_000)):
        moments.add(x[:, :, part], y[:, :, part])
    wide = np.concatenate([x.double().numpy(), np.ones((3, 1, 10_000))], 1)
    assert moments.count == 10_000
    tolerance = 1e-12 if dtype == torch.float64 else 1e-9
    np.testing.assert_allclose(moments.gram.numpy(), wide @ wide.transpose(0, 2, 1), rtol=tolerance)
    np.testing.assert_allclose(moments.cross.numpy(), y.double().numpy() @ wide.transpose(0, 2, 1), rtol=tolerance)
    np.testing.assert_allclose(moments.energy.numpy(), np.square(y.double().numpy()).sum(2), rtol=tolerance)


def test_a_large_mean_does_not_cost_the_covariance():
    """Single precision, with a mean of a thousand deviations: products without the mean taken off would err by half a deviation."""
    x, y = draw(2, 1, 3, 5000).float() + 1000, draw(3, 1, 1, 5000).float()
    moments = moments_of(x, y)
    mean = moments.gram[0, :-1, -1] / moments.count
    covariance = moments.gram[0, :-1, :-1] / moments.count - mean[:, None] * mean
    np.testing.assert_allclose(covariance.numpy(), np.cov(x[0].double().numpy(), bias=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_refit_is_ridge_regression_towards_the_old_weight(groups, ridge, own, biased, sparse):
    x, y, weight, bias = problem(10, groups, 5, 6, 200)
    support = draw(20, groups, 5, 6) > 0 if sparse else None
    new, shift = refit(moments_of(x, y), weight, bias if biased else None, ridge, support, own)
    for group in range(groups):
        expected, offset = by_numpy(
            x[group], y[group], weight[group], bias if biased else None, ridge, own, None if support is None else support[group]
        )
        np.testing.assert_allclose(new[group].numpy(), expected, rtol=1e-6, atol=1e-8)
        if biased:
            assert shift is not None
            np.testing.assert_allclose(shift[group].numpy(), offset, rtol=1e-6, atol=1e-7)
        else:
            assert shift is None


def test_a_support_with_empty_and_full_rows_in_many_batches(monkeypatch):
    x, y, weight, bias = problem(30, 1, 40, 12, 300)
    support = torch.rand(1, 40, 12, generator=torch.Generator().manual_seed(3)) < torch.linspace(0, 1, 40)[None, :, None]
    support[:, 0], support[:, -1] = False, True
    expected, offset = by_numpy(x[0], y[0], weight[0], bias, 0.02, support=support[0])
    monkeypatch.setattr(module, "ELEMENTS", 500)
    new, shift = refit(moments_of(x, y), weight, bias, 0.02, support)
    assert shift is not None and not bool(new[~support].any())
    np.testing.assert_allclose(new[0].numpy(), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(shift[0].numpy(), offset, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True])
def test_undetermined_weights_change_least(sparse):
    """Fewer samples than columns: the least-norm change, as numpy's lstsq gives it for what the old weight misses."""
    x, y, weight, bias = problem(40, 1, 3, 20, 8)
    centered, missed = x[0] - x[0].mean(1, keepdim=True), y[0] - weight[0] @ x[0]
    change = np.linalg.lstsq(centered.T.numpy(), (missed - missed.mean(1, keepdim=True)).T.numpy(), rcond=1e-10)[0].T
    support = torch.ones_like(weight, dtype=torch.bool) if sparse else None
    new, shift = refit(moments_of(x, y), weight, bias, 0.0, support)
    np.testing.assert_allclose((new - weight)[0].numpy(), change, atol=1e-3 * np.abs(change).max())
    assert relative(x, y, new, shift) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_constant_and_dead_inputs_keep_their_weights(dtype, ridge, own, sparse):
    x, y, weight, bias = problem(50, 2, 3, 6, 100)
    x[:, 1], x[:, 4] = 17.3, 0.0
    x, y = x.to(dtype), y.to(dtype)
    support = torch.ones_like(weight, dtype=torch.bool) if sparse else None
    new, shift = refit(moments_of(x, y), weight, bias, ridge, support, own)
    assert torch.equal(new[:, :, [1, 4]], weight[:, :, [1, 4]]) and shift is not None
    # What is left is what least squares without these inputs leaves: the bias stands in for them.
    others = [0, 2, 3, 5]
    for group in range(2):
        rest = y[group].double() - weight[group][:, [1, 4]] @ x[group, [1, 4]].double()
        expected, offset = by_numpy(x[group, others].double(), rest, weight[group][:, others], bias, ridge, own)
        tolerance = 1e-6 if dtype == torch.float64 else 1e-4
        np.testing.assert_allclose(new[group][:, others].numpy(), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(shift[group].numpy(), offset, rtol=10 * tolerance, atol=10 * tolerance)


def test_twin_inputs_share_the_change():
    x, y, weight, bias = problem(60, 1, 3, 4, 100)
    x[:, 3] = x[:, 2]
    for ridge in (0.0, 0.01):
        new, shift = refit(moments_of(x, y), weight, bias, ridge)
        change = new - weight
        torch.testing.assert_close(change[:, :, 2], change[:, :, 3], rtol=1e-4, atol=1e-8)
        assert relative(x, y, new, shift) < relative(x, y, weight, bias)


@pytest.mark.parametrize("biased", [False, True])
def test_residual_is_that_of_the_samples(biased):
    x, y, weight, bias = problem(70, 2, 3, 5, 80)
    chosen = bias if biased else None
    assert residual(moments_of(x, y), weight, chosen) == pytest.approx(relative(x, y, weight, chosen), rel=1e-9)
    exact = y - (y - weight @ x - bias[:, :, None])
    assert residual(moments_of(x, exact), weight, bias) < 1e-12


def test_residual_of_targets_that_never_vary():
    x = draw(80, 1, 3, 50)
    weight, bias = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    assert residual(moments_of(x, torch.full((1, 2, 50), 4.0)), weight, bias) == pytest.approx(1)
    assert residual(moments_of(x, torch.full((1, 2, 50), 4.0)), weight, bias + 4) == pytest.approx(0, abs=1e-12)
    assert residual(moments_of(x, torch.zeros(1, 2, 50)), weight, bias) == 0


def every_candidate(fit, held, weight, bias, ridges):
    """All that best_refit may choose from, each solved plainly: (name, error on held), by the definitions and numpy's inverse."""
    (x, y), (x_held, y_held) = fit, held
    results = {"nothing": relative(x_held, y_held, weight, bias)}

    def score(name, change):
        new = weight + torch.from_numpy(change)
        shift = (y - new @ x).mean(2)
        results[name] = min(results.get(name, np.inf), relative(x_held, y_held, new, shift))

    score("bias", np.zeros(weight.shape))
    centered = (x - x.mean(2, keepdim=True)).numpy()
    missed = (y - weight @ x).numpy()
    a, r = centered @ centered.transpose(0, 2, 1), missed @ centered.transpose(0, 2, 1)
    for own in (False, True):
        unit = np.stack([np.diag(np.diag(part)) if own else np.eye(len(part)) * np.trace(part) / len(part) for part in a])
        for ridge in ridges:
            score(f"ridge {own}", r @ np.linalg.inv(a + ridge * unit))
    return results


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("samples", [6, 15, 40, 1000])
def test_best_refit_is_the_best_of_all_candidates_solved_one_by_one(groups, samples):
    x, y, weight, bias = problem(90 + samples, groups, 4, 12, samples + 200, noise=1.0)
    x *= torch.logspace(-1, 1, 12, dtype=torch.float64)[:, None]
    fit, held = (x[:, :, :samples], y[:, :, :samples]), (x[:, :, samples:], y[:, :, samples:])
    ridges = (1e-3, 0.1, 3.0)
    new, shift, before, after = best_refit(moments_of(*fit), moments_of(*held), weight, bias, ridges)
    errors = every_candidate(fit, held, weight, bias, ridges)
    assert before == pytest.approx(errors["nothing"], rel=1e-9)
    assert after == pytest.approx(min(errors.values()), rel=1e-6)
    assert relative(*held, new, shift) == pytest.approx(after, rel=1e-9)


def test_a_ridge_of_zero_and_no_ridge_at_all_are_fine():
    x, y, weight, bias = problem(95, 2, 3, 12, 100)
    x[:, 3] = x[:, 2]
    fit, held = moments_of(x[:, :, :8], y[:, :, :8]), moments_of(x[:, :, 8:], y[:, :, 8:])
    for ridges in ((0.0,), ()):
        new, shift, before, after = best_refit(fit, held, weight, bias, ridges)
        assert bool(torch.isfinite(new).all()) and after <= before and relative(x[:, :, 8:], y[:, :, 8:], new, shift) == pytest.approx(after)


def test_best_refit_without_a_bias_gives_none():
    x, y, weight, _ = problem(100, 1, 3, 5, 400)
    new, shift, before, after = best_refit(moments_of(x[:, :, :200], y[:, :, :200]), moments_of(x[:, :, 200:], y[:, :, 200:]), weight, None)
    assert shift is None and after < before and after == pytest.approx(relative(x[:, :, 200:], y[:, :, 200:], new, None), rel=1e-9)


@pytest.mark.parametrize("own", [False, True])
def test_wide_and_sparse_layers_choose_among_ridges(own, monkeypatch):
    x, y, weight, bias = problem(110, 1, 4, 12, 230, noise=1.0)
    # Uneven inputs, of which small ones (own) or large ones matter, so that each kind of ridge has its case.
    fit, held = moments_of(x[:, :, :30], y[:, :, :30]), moments_of(x[:, :, 30:], y[:, :, 30:])
    ridges = (0.01, 0.1, 1.0)
    monkeypatch.setattr(module, "LARGEST_COLUMNS", 11)
    support = draw(111, 1, 4, 12) > -0.5 if own else None
    old = weight if support is None else weight * support
    new, shift, before, after = best_refit(fit, held, weight, bias, ridges, support)
    solved = [refit(fit, old, bias, ridge, support, kind) for ridge in ridges for kind in (False, True)]
    assert before == residual(held, old, bias)
    assert after == pytest.approx(min(residual(held, *pair) for pair in solved), rel=1e-9) and after < before
    assert residual(held, new, shift) == pytest.approx(after, rel=1e-9)
    assert support is None or not bool(new[~support].any())


def test_a_refit_that_does_not_help_is_not_taken():
    """Few samples of another kind: whatever they say is wrong on the held ones, where the old weight is right."""
    x, _, weight, bias = problem(120, 1, 3, 8, 200)
    right = weight @ x + bias[:, :, None]
    wrong = moments_of(draw(121, 1, 8, 4) + 5, draw(122, 1, 3, 4) - 50)
    new, shift, before, after = best_refit(wrong, moments_of(x, right), weight, bias)
    assert new is weight and shift is bias and before == after and before < 1e-12


def test_only_the_mean_is_mended_where_only_the_mean_is_off():
    x, _, weight, bias = problem(130, 1, 3, 30, 200)
    right = weight @ x + bias[:, :, None] + 3
    right[:, :, :40] += 0.5 * draw(131, 1, 3, 40)
    right[:, :, :40] += 3 - (right - weight @ x - bias[:, :, None])[:, :, :40].mean(2, keepdim=True)
    new, shift, before, after = best_refit(moments_of(x[:, :, :40], right[:, :, :40]), moments_of(x[:, :, 40:], right[:, :, 40:]), weight, bias)
    assert torch.equal(new, weight) and shift is not None and before > 1e-3 and after < 1e-12
    torch.testing.assert_close(shift, bias + 3)


def test_weights_keep_their_precision_and_few_samples_do_not_explode():
    x, y, weight, bias = problem(140, 2, 3, 40, 300)
    weight, bias = weight.float(), bias.float()
    fit, held = moments_of(x[:, :, :5].float(), y[:, :, :5].float()), moments_of(x[:, :, 5:].float(), y[:, :, 5:].float())
    new, shift, before, after = best_refit(fit, held, weight, bias)
    assert new.dtype == torch.float32 and shift is not None and shift.dtype == torch.float32 and after <= before
    for ridge in (0.0, 1e-3):
        plain, _ = refit(fit, weight, bias, ridge)
        assert bool(torch.isfinite(plain).all()) and float((plain - weight).norm()) < 10 * float(weight.norm())


def test_what_does_not_fit_is_refused():
    moments = Moments.zero(1, 2, 3)
    for x, y in ((draw(0, 1, 4, 5), draw(0, 1, 2, 5)), (draw(0, 1, 3, 5), draw(0, 1, 2, 6)), (draw(0, 2, 3, 5), draw(0, 2, 2, 5))):
        with pytest.raises(ValueError, match=r"expected \[1, 3, n\] and \[1, 2, n\]"):
            moments.add(x, y)
    with pytest.raises(ValueError, match="NaN or infinite"):
        moments.add(draw(0, 1, 3, 5) / 0, draw(0, 1, 2, 5))
    assert moments.count == 0 and not bool(moments.gram.any())
    with pytest.raises(ValueError, match="no positions"):
        refit(moments, torch.zeros(1, 2, 3), torch.zeros(1, 2), 0.1)
