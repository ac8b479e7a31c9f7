"""Sparsity mathematics: scores by the plain double loop, choices by brute force, solutions by numpy's least squares."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from downsize.numerics import grids
from downsize.numerics.hessian import DAMPING, gptq
from downsize.numerics.sparsity import Pattern, Quadratic, counts_above, erk, keep_best, keep_pattern, lamp, least_squares, sparsegpt, surgeon, wanda


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(groups: int = 1, rows: int = 3, columns: int = 8, samples: int = 40, drift: float = 0.1) -> tuple[Tensor, Tensor, Tensor, Quadratic]:
    """A weight, correlated inputs of it that have drifted from the original's, the original outputs, and their quadratic."""
    weight = normal(groups, rows, columns)
    before = normal(groups, columns, columns, seed=1) @ normal(groups, columns, samples, seed=2)
    now, y = before + drift * normal(groups, columns, samples, seed=3), weight @ before
    quadratic = Quadratic.of(groups, rows, columns)
    half = samples // 2
    quadratic.add(now[:, :, :half], y[:, :, :half])
    quadratic.add(now[:, :, half:], y[:, :, half:])
    return weight, now, y, quadratic


def masks_of(count: int, columns: int) -> list[np.ndarray]:
    made = []
    for kept in itertools.combinations(range(columns), count):
        mask = np.zeros(columns, dtype=bool)
        mask[list(kept)] = True
        made.append(mask)
    return made


def ridge_solution(x: np.ndarray, y: np.ndarray, old: np.ndarray, mask: np.ndarray, pull: float) -> np.ndarray:
    """argmin |y - w x|^2 + pull |w - old|^2 over w that are zero outside the mask, by numpy's lstsq on the stacked system."""
    system = np.concatenate([x[mask].T, np.sqrt(pull) * np.eye(int(mask.sum()))])
    right = np.concatenate([y, np.sqrt(pull) * old[mask]])
    solved = np.zeros_like(old)
    solved[mask] = np.linalg.lstsq(system, right, rcond=None)[0]
    return solved


def test_the_quadratic_is_the_error_of_the_outputs():
    _, x, y, quadratic = layer(groups=2)
    for seed in range(3):
        trial = normal(2, 3, 8, seed=seed + 10)
        expected = float((y - trial @ x).square().sum() / y.square().sum())
        assert quadratic.error(trial) == pytest.approx(expected, rel=1e-9)
    assert Quadratic.of(1, 2, 3).error(torch.zeros(1, 2, 3)) == 0


# How many to keep ------------------------------------------------------------------------------------------------------------------


def test_lamp_is_the_plain_double_loop():
    weight = normal(2, 3, 5)
    flat = weight.flatten().tolist()
    # ties never occur among normal numbers, so "larger or itself" is all that are at least as large
    expected = [w * w / sum(v * v for v in flat if abs(v) >= abs(w)) for w in flat]
    scores = lamp(weight)
    torch.testing.assert_close(scores.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert float(scores.max()) == pytest.approx(1) and int(scores.argmax()) == int(weight.abs().argmax())
    torch.testing.assert_close(lamp(100 * weight), scores)
    assert torch.equal(lamp(torch.zeros(1, 2, 2)), torch.zeros(1, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.7, 0.999])
def test_erk_is_proportional_to_the_dimensions_and_keeps_the_total(density):
    shapes = [(8, 3, 3, 3), (64, 32, 3, 3), (128, 256), (10, 128)]
    shares, sizes = erk(shapes, density), [int(np.prod(shape)) for shape in shapes]
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    factors = [share / (sum(shape) / size) for share, shape, size in zip(shares, shapes, sizes, strict=True)]
    partial = [factor for factor, share in zip(factors, shares, strict=True) if share < 1]
    assert all(0 < share <= 1 for share in shares) and partial == pytest.approx([partial[0]] * len(partial))
    # a full layer would have had more than all of its weights
    assert all(factor <= partial[0] * (1 + 1e-9) for factor, share in zip(factors, shares, strict=True) if share == 1)
    assert erk(shapes, 1.0) == pytest.approx([1.0] * 4)


def test_the_highest_of_all_layers_are_counted_and_no_row_is_forgotten():
    scores = [normal(1, 4, 6, seed=1).abs(), 3 * normal(2, 3, 5, seed=2).abs(), 1e-6 * normal(1, 5, 4, seed=3).abs()]
    counts = counts_above(scores, 30)
    # by hand: the best of each of the 4 + 6 + 5 rows, then the highest of what is left
    rest = []
    for number, score in enumerate(scores):
        for row in score.flatten(0, 1):
            rest += [(float(value), number) for value in row.sort(descending=True).values[1:]]
    expected = [4, 6, 5]
    for _, number in sorted(rest, reverse=True)[: 30 - 15]:
        expected[number] += 1
    assert counts == expected and counts[2] == 5


# Which to keep ---------------------------------------------------------------------------------------------------------------------


def test_the_best_are_kept_with_one_in_each_row():
    scores = torch.tensor([[[9.0, 8, 7, 6], [0.1, 0.3, 0.2, 0]]])
    assert keep_best(scores, 3).tolist() == [[[True, True, False, False], [False, True, False, False]]]
    assert int(keep_best(scores, 0).sum()) == 2
    assert keep_best(scores, 4, per_row=True).tolist() == [[[True, True, False, False], [False, True, True, False]]]
    assert keep_best(scores, 5, per_row=True).tolist() == [[[True, True, True, False], [False, True, True, False]]]
    assert bool(keep_best(scores, 8).all()) and bool(keep_best(scores, 99).all())


@pytest.mark.parametrize(("text", "columns"), [("2:4", 12), ("4:8", 16), ("1:3", 9)])
def test_a_pattern_keeps_the_best_of_every_run(text, columns):
    pattern, scores = Pattern.parse(text), normal(2, 3, columns)
    mask = keep_pattern(scores, pattern)
    for g, r, start in itertools.product(range(2), range(3), range(0, columns, pattern.of)):
        run = scores[g, r, start : start + pattern.of].tolist()
        best = sorted(range(pattern.of), key=lambda i, run=run: -run[i])[: pattern.keep]
        assert mask[g, r, start : start + pattern.of].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("text", ["4:4", "4:2", "0:4", "2/4", "", "a:b", "2:4:8", "-1:4"])
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError, match="N:M"):
        Pattern.parse(text)


def test_wanda_is_what_each_weight_alone_would_cost():
    weight, x, _, quadratic = layer(drift=0)
    scores = wanda(weight, quadratic.gram)
    for r, c in itertools.product(range(3), range(8)):
        without = weight.clone()
        without[0, r, c] = 0
        assert float(scores[0, r, c] ** 2) == pytest.approx(float(((weight - without) @ x).square().sum()))


# SparseGPT -------------------------------------------------------------------------------------------------------------------------


def damped_inputs(gram: Tensor) -> np.ndarray:
    """Inputs [columns, columns] whose Gram matrix is ``gram`` with the damping."""
    matrix = gram.numpy()
    return np.linalg.cholesky(matrix + DAMPING * np.diag(matrix).mean() * np.eye(len(matrix)))


def sequential(weight: np.ndarray, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Column after column: what is zeroed is zero, and all columns behind are solved for anew, those before being what they are."""
    settled, rest = np.zeros_like(weight), weight.copy()
    for j in range(len(weight)):
        settled[j] = rest[j] if mask[j] else 0.0
        if j + 1 < len(weight):
            missing = (weight - np.concatenate([settled[: j + 1], np.zeros(len(weight) - j - 1)])) @ x
            rest[j + 1 :] = np.linalg.lstsq(x[j + 1 :].T, missing, rcond=None)[0]
    return settled


@pytest.mark.parametrize("columns", [9, 150])  # less and more than a block of the sweep
def test_sparsegpt_compensates_as_sequential_least_squares_on_its_mask_does(columns):
    weight, _, _, quadratic = layer(groups=2, rows=2, columns=columns, samples=3 * columns, drift=0)
    made = sparsegpt(weight, quadratic.gram, count=2 * columns)
    assert int((made != 0).sum()) == 2 * columns and bool((made != 0).any(2).all())
    for g, r in itertools.product(range(2), range(2)):
        expected = sequential(weight[g, r].numpy(), damped_inputs(quadratic.gram[g]), (made[g, r] != 0).numpy())
        np.testing.assert_allclose(made[g, r].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_sparsegpt_takes_what_costs_least_when_it_arrives_at_a_block():
    weight, _, _, quadratic = layer(rows=1, columns=10, drift=0)
    made = sparsegpt(weight, quadratic.gram, count=4)[0, 0]
    # one block: a column's cost is what zeroing it alone adds when those before it are settled and those behind it move
    x = damped_inputs(quadratic.gram[0])
    costs = []
    for j in range(10):
        without = weight[0, 0].numpy().copy()
        missing = without[j] * x[j]
        moved = np.linalg.lstsq(x[j + 1 :].T, missing, rcond=None)[0] if j < 9 else np.zeros(0)
        costs.append(float(((missing - moved @ x[j + 1 :]) ** 2).sum()))
    overall = [float(weight[0, 0, j] ** 2 / np.linalg.inv(x @ x.T)[j, j]) for j in range(10)]
    floor = int(np.argmax(overall))
    others = sorted((j for j in range(10) if j != floor), key=lambda j: -costs[j])[:3]
    assert sorted([floor, *others]) == made.nonzero().flatten().tolist()


@pytest.mark.parametrize("count", [6, 7, 40, 149, 300, 899, 900])
def test_sparsegpt_leaves_exactly_so_many(count):
    weight, _, _, quadratic = layer(rows=6, columns=150, samples=60)
    made = sparsegpt(weight, quadratic.gram, count)
    assert int((made != 0).sum()) == count and bool((made != 0).any(2).all())
    if count == 900:
        torch.testing.assert_close(made, weight)


def test_sparsegpt_keeps_patterns_and_old_zeros_and_gives_up_unseen_inputs_first():
    weight, x, y, quadratic = layer(rows=5, columns=24, drift=0)
    pattern = Pattern.parse("2:4")
    made = sparsegpt(weight, quadratic.gram, 60, pattern)
    assert torch.equal((made != 0).unflatten(2, (-1, 4)).sum(3), torch.full((1, 5, 6), 2))
    plain = weight * keep_pattern(weight.abs(), pattern)
    assert quadratic.error(made) < quadratic.error(plain)
    allowed = normal(1, 5, 24, seed=5) > 0
    for again in (sparsegpt(weight, quadratic.gram, 40, allowed=allowed), sparsegpt(weight, quadratic.gram, 0, pattern, allowed)):
        assert not bool(again[~allowed].any()) and bool(again.any())
    x[:, 7] = 0
    seen = Quadratic.of(1, 5, 24)
    seen.add(x, y)
    assert not bool(sparsegpt(weight, seen.gram, 100)[:, :, 7].any())


# The best values -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_the_polish_is_numpys_least_squares_on_the_support(ridge, share):
    weight, x, y, quadratic = layer(groups=2, rows=5, columns=12)
    mask = keep_best(normal(2, 5, 12, seed=4), round(share * 120))
    made = least_squares(weight, mask, quadratic, ridge)
    assert not bool(made[~mask].any())
    for g, r in itertools.product(range(2), range(5)):
        pull = ridge * float(quadratic.gram[g].diagonal().mean())
        expected = ridge_solution(x[g].numpy(), y[g, r].numpy(), weight[g, r].numpy(), mask[g, r].numpy(), pull)
        np.testing.assert_allclose(made[g, r].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_polish_splits_many_rows_and_leaves_empty_ones_empty(monkeypatch: Any):
    weight, _, _, quadratic = layer(rows=20, columns=12)
    mask = normal(1, 20, 12, seed=6) > 0.5
    mask[0, 3] = False
    whole = least_squares(weight, mask, quadratic, 0.01)
    monkeypatch.setattr("downsize.numerics.sparsity.SOLVED_ELEMENTS", 50)
    torch.testing.assert_close(least_squares(weight, mask, quadratic, 0.01), whole)
    assert not bool(whole[0, 3].any()) and bool(whole.any())


def test_the_polish_is_finite_where_inputs_are_unseen_equal_or_few():
    x = normal(1, 6, 2).float()  # two samples of six inputs
    x[:, 1] = x[:, 0]
    x[:, 2] = 0
    weight = normal(1, 3, 6).float()
    quadratic = Quadratic.of(1, 3, 6)
    quadratic.add(x, weight @ x)
    for mask in (torch.ones(1, 3, 6, dtype=torch.bool), keep_best(weight.abs(), 9)):
        made = least_squares(weight, mask, quadratic, 0.01)
        assert bool(made.isfinite().all()) and float(made.abs().max()) <= 3 * float(weight.abs().max())
    nothing = Quadratic.of(1, 3, 6)
    mask = keep_best(weight.abs(), 9)
    torch.testing.assert_close(least_squares(weight, mask, nothing, 0.01), weight.double() * mask)


# The surgeon -----------------------------------------------------------------------------------------------------------------------


def test_one_step_of_the_surgeon_is_the_best_single_weight_by_brute_force():
    weight, x, y, quadratic = layer(rows=2, columns=7)
    made = surgeon(weight, quadratic, [13], torch.ones_like(weight, dtype=torch.bool), 1e-9)
    best = None
    for r, c in itertools.product(range(2), range(7)):
        solved = np.stack(
            [ridge_solution(x[0].numpy(), y[0, i].numpy(), weight[0, i].numpy(), np.arange(7) != (c if i == r else -1), 0.0) for i in (0, 1)]
        )
        error = float(np.square(y[0].numpy() - solved @ x[0].numpy()).sum())
        if best is None or error < best[0]:
            best = (error, solved)
    assert best is not None
    np.testing.assert_allclose(made[0].numpy(), best[1], rtol=1e-5, atol=1e-6)


def test_the_surgeon_going_one_by_one_is_greedy_backward_selection():
    weight, x, y, quadratic = layer(rows=1, columns=8)
    mask = np.ones(8, dtype=bool)
    for left in range(7, 2, -1):
        trials = [trial for trial in masks_of(left, 8) if not (trial & ~mask).any()]
        solved = [ridge_solution(x[0].numpy(), y[0, 0].numpy(), weight[0, 0].numpy(), trial, 0.0) for trial in trials]
        mask = trials[int(np.argmin([np.square(y[0, 0].numpy() - one @ x[0].numpy()).sum() for one in solved]))]
        made = surgeon(weight, quadratic, list(range(7, left - 1, -1)), torch.ones_like(weight, dtype=torch.bool), 1e-9)
        assert (made[0, 0] != 0).tolist() == mask.tolist()


def best_of_all_masks(x: np.ndarray, y: np.ndarray, count: int) -> float:
    """The least error |y - w x|^2 of any weight [rows, columns] with ``count`` values, at least one in a row: every mask of every row."""
    rows, columns = len(y), len(x)
    least = {0: 0.0}
    for r in range(rows):
        own = {}
        for size in range(1, columns + 1):
            solved = [ridge_solution(x, y[r], np.zeros(columns), mask, 0.0) for mask in masks_of(size, columns)]
            own[size] = min(float(np.square(y[r] - w @ x).sum()) for w in solved)
        sums = [(done + size, error + own[size]) for done, error in least.items() for size in own]
        least = {total: min(error for other, error in sums if other == total) for total, _ in sums}
    return least[count]


def test_the_surgeon_is_near_the_best_of_all_masks_and_before_the_other_methods():
    found = []
    for seed in range(6):
        weight = normal(1, 3, 7, seed=seed)
        x = normal(7, 7, seed=seed + 100) @ normal(7, 30, seed=seed + 200)
        y, quadratic, ones = weight[0] @ x, Quadratic.of(1, 3, 7), torch.ones_like(weight, dtype=torch.bool)
        quadratic.add(x[None], y[None])
        best = best_of_all_masks(x.numpy(), y.numpy(), 8) / quadratic.energy
        masks = [keep_best(weight.abs(), 8), keep_best(wanda(weight, quadratic.gram), 8, per_row=True), sparsegpt(weight, quadratic.gram, 8) != 0]
        others = [quadratic.error(least_squares(weight, mask, quadratic, 1e-9)) for mask in masks]
        made = quadratic.error(surgeon(weight, quadratic, [17, 14, 11, 8], ones, 1e-9))
        assert min(made, *others) >= best - 1e-9
        found.append([best, made, *others])
    best, made, *others = np.mean(found, axis=0)
    assert made < 1.5 * best and made < 0.9 * min(others), (best, made, others)


def test_the_surgeon_keeps_patterns_and_old_zeros():
    weight, _, _, quadratic = layer(rows=5, columns=16)
    allowed = normal(1, 5, 16, seed=8) > -0.5
    made = surgeon(weight, quadratic, [Pattern(3, 4), Pattern(2, 4)], allowed, 0.01)
    assert int((made != 0).unflatten(2, (-1, 4)).sum(3).max()) == 2 and not bool(made[~allowed].any())
    made = surgeon(weight, quadratic, [40, 20], allowed, 0.01)
    assert int((made != 0).sum()) == 20 and not bool(made[~allowed].any()) and bool((made != 0).any(2).all())


# GPTQ on sparse weights ------------------------------------------------------------------------------------------------------------


def test_gptq_revives_no_zero_and_loses_less_than_rounding():
    weight, x, _, quadratic = layer(groups=2, rows=6, columns=140, samples=400, drift=0)
    sparse = (weight * keep_best(weight.abs(), 6 * 140)).float()
    scale = sparse.abs().amax(2) / 7
    grid = grids.Grid(-7, 7)
    rounded = gptq(sparse, quadratic.gram, scale, grid)
    nearest = (sparse / scale[..., None]).round().clamp(-7, 7) * scale[..., None]
    assert not bool(rounded[sparse == 0].any()) and bool(rounded.any())

    def lost(other: Tensor) -> float:
        return float(((other - sparse).double() @ x).square().sum())

    assert lost(rounded) < 0.9 * lost(nearest)
