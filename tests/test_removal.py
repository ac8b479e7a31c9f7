"""Removal of units against brute force: every remaining choice solved anew by numpy's least squares at every step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downsize.numerics import removal
from downsize.numerics.removal import Reading, Removal, remove, repaired

SMALL = 1e-9


def problem(seed: int, rows: int, unit: list[int], importance: float = 1.0, samples: int = 60) -> tuple[Reading, torch.Tensor]:
    """A reading of correlated inputs of uneven size, and those inputs [columns, samples]."""
    generator = torch.Generator().manual_seed(seed)
    columns = len(unit)
    x = torch.randn(columns, columns, generator=generator, dtype=torch.float64) @ torch.randn(columns, samples, generator=generator).double()
    x *= torch.rand(columns, 1, generator=generator, dtype=torch.float64) + 0.1
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return Reading(weight, x @ x.T, torch.tensor(unit), importance), x


# One column a unit; several; a conv and a linear reading the same units; columns that never go; units that one reading has not.
CASES: dict[str, list[tuple[int, list[int], float]]] = {
    "neurons": [(3, [0, 1, 2, 3, 4], 1.0)],
    "channels": [(4, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 1.0)],
    "more rows than columns": [(30, [3, 1, 2, 0], 1.0)],
    "two readings": [(4, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 0.5), (2, [3, 2, 1, 0], 7.0)],
    "columns that stay": [(3, [-1, 0, 1, 2, 3, -1, 4], 1.0)],
    "uneven": [(3, [0, 1, 1, 2, 2, 2, 0, 3], 1.0), (2, [3, 0, 0, 5, -1], 2.0)],
    "one reading each": [(3, [0, 1, 2], 1.0), (3, [3, 4, 5], 1.0)],
}


def build(name: str) -> tuple[list[Reading], list[torch.Tensor], int]:
    made = [problem(i, rows, unit, importance) for i, (rows, unit, importance) in enumerate(CASES[name])]
    return [reading for reading, _ in made], [x for _, x in made], max(max(unit) for _, unit, _ in CASES[name]) + 1


def least_error(readings: list[Reading], inputs: list[torch.Tensor], gone: tuple[int, ...]) -> float:
    """The error without these units, the rest solved by numpy's least squares on the inputs themselves."""
    total = 0.0
    for reading, x in zip(readings, inputs, strict=True):
        stays = ~np.isin(reading.unit.numpy(), gone)
        old = (reading.weight @ x).numpy()
        new = np.linalg.lstsq(x.numpy()[stays].T, old.T, rcond=None)[0].T if stays.any() else np.zeros((len(old), 0))
        total += reading.importance * float(np.square(old - new @ x.numpy()[stays]).sum())
    return total


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_best_of_all_remaining_units(name):
    readings, inputs, units = build(name)
    found = remove(readings, units, units, damping=SMALL)
    order = found.order.tolist()
    assert sorted(order) == list(range(units)) and float(found.errors[0]) == 0
    scale = least_error(readings, inputs, tuple(range(units)))
    for n in range(units):
        errors = {unit: least_error(readings, inputs, (*order[:n], unit)) for unit in set(range(units)) - set(order[:n])}
        assert errors[order[n]] == pytest.approx(min(errors.values()), rel=1e-5, abs=1e-6 * scale)
        assert float(found.errors[n + 1]) == pytest.approx(errors[order[n]], rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grain", [1, 2, 3])
@pytest.mark.parametrize("damping", [SMALL, 0.01, 1.0])
def test_errors_are_those_of_the_repaired_weights(name, grain, damping):
    readings, inputs, units = build(name)
    found = remove(readings, units, units, grain, damping)
    for n in range(units + 1):
        new = [repaired(reading, found.order[:n], damping) for reading in readings]
        for reading, weight in zip(readings, new, strict=True):
            assert not weight[:, torch.isin(reading.unit, found.order[:n])].any()
        direct = sum(
            reading.importance * float(((reading.weight - weight) @ x).square().sum())
            for reading, weight, x in zip(readings, new, inputs, strict=True)
        )
        assert float(found.errors[n]) == pytest.approx(direct, rel=1e-6, abs=1e-9 * float(found.errors[-1]))


def test_repaired_weights_minimise_the_damped_error():
    (reading,), (x,), _ = build("channels")
    gone = torch.tensor([1, 3])
    level = 0.3 * float(reading.gram.diagonal().mean())
    stays = ~torch.isin(reading.unit, gone)
    # The damping as further samples: of each column alone, whose output the kept columns should keep.
    tall = torch.cat([x, level**0.5 * torch.eye(x.shape[0], dtype=torch.float64)], 1)
    expected = np.linalg.lstsq(tall[stays].T.numpy(), (reading.weight @ tall).T.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(repaired(reading, gone, 0.3)[:, stays].numpy(), expected, rtol=1e-8, atol=1e-10)


def test_a_greedy_order_is_near_the_best_subset():
    """Greedy is no search of subsets: it may not be better than brute force over them, and is not much worse here."""
    readings, inputs, units = build("uneven")
    found = remove(readings, units, 3, damping=SMALL)
    best = min(least_error(readings, inputs, gone) for gone in itertools.combinations(range(units), 3))
    assert best * (1 - 1e-6) <= float(found.errors[3]) <= 2 * best


@pytest.mark.parametrize("columns", [1, 3])
def test_a_twin_goes_for_nothing_and_its_weights_go_to_the_other(columns):
    reading, x = problem(5, 4, [unit for unit in range(6) for _ in range(columns)])
    x = torch.cat([x, x[2 * columns : 3 * columns]])
    weight = torch.cat([reading.weight, torch.full((4, columns), 100.0)], 1)
    twins = Reading(weight, x @ x.T, torch.cat([reading.unit, torch.full((columns,), 6)]))
    found = remove([twins], 7, 2, damping=1e-6)
    assert int(found.order[0]) in (2, 6) and int(found.order[1]) not in (2, 6)
    assert float(found.errors[1]) < 1e-3 * float(found.errors[2])
    new = repaired(twins, found.order[:1], 1e-6)
    other = 6 if int(found.order[0]) == 2 else 2
    kept = twins.unit == other
    together = twins.weight[:, twins.unit == 2] + twins.weight[:, twins.unit == 6]
    torch.testing.assert_close(new[:, kept], together, rtol=1e-3, atol=1e-3)
    rest = (twins.unit != 2) & (twins.unit != 6)
    torch.testing.assert_close(new[:, rest], twins.weight[:, rest], rtol=1e-3, atol=0.1)


def test_units_whose_input_was_never_seen_go_first_and_cost_nothing():
    reading, x = problem(6, 3, [0, 0, 1, 1, 2, 2, 3, 3])
    x[2:4] = 0
    x[6:] = 0
    silent = Reading(reading.weight, x @ x.T, reading.unit)
    found = remove([silent], 4, 4)
    assert set(found.order[:2].tolist()) == {1, 3} and found.errors[:3].tolist() == [0, 0, 0] and float(found.errors[3]) > 0
    # Weights that nobody asked to remove are not touched, though nothing was ever read by them.
    assert torch.equal(repaired(silent, torch.tensor([1]))[:, 6:], reading.weight[:, 6:])


def test_a_constant_unit_costs_nothing_where_a_column_of_ones_takes_it_over():
    reading, x = problem(7, 3, [0, 1, 2, 3, -1])
    x[1], x[4] = 3.0, 1.0
    found = remove([Reading(reading.weight, x @ x.T, reading.unit)], 4, 1, damping=1e-8)
    assert found.order.tolist() == [1] and float(found.errors[1]) < 1e-6 * float((reading.weight @ x).square().sum())
    new = repaired(Reading(reading.weight, x @ x.T, reading.unit), found.order, 1e-8)
    torch.testing.assert_close(new[:, 4], reading.weight[:, 4] + 3 * reading.weight[:, 1], rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.sampled_from([1, 3]), grain=st.sampled_from([1, 2]))
def test_renaming_units_renames_the_order(seed, columns, grain):
    units = 6
    names = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    reading, _ = problem(seed, 3, [unit for unit in range(units) for _ in range(columns)])
    shuffled = torch.randperm(units * columns, generator=torch.Generator().manual_seed(seed + 1))
    renamed = Reading(reading.weight[:, shuffled], reading.gram[shuffled][:, shuffled], names[reading.unit[shuffled]])
    one, two = remove([reading], units, units, grain), remove([renamed], units, units, grain)
    assert names[one.order].tolist() == two.order.tolist()
    torch.testing.assert_close(one.errors, two.errors, rtol=1e-6, atol=1e-6 * float(one.errors[-1]))


def test_the_scale_of_the_gram_matrix_scales_the_errors_alone():
    readings, _, units = build("channels")
    one = remove(readings, units, units)
    two = remove([Reading(r.weight, r.gram * 1e-12, r.unit) for r in readings], units, units)
    assert torch.equal(one.order, two.order)
    torch.testing.assert_close(one.errors * 1e-12, two.errors, rtol=1e-8, atol=0)


def test_importance_decides_between_readings():
    reading, _ = problem(8, 3, [0, 1])
    apart = [
        Reading(reading.weight, torch.diag(torch.tensor([1.0, 4.0])).double(), reading.unit),
        Reading(reading.weight, torch.diag(torch.tensor([4.0, 1.0])).double(), reading.unit),
    ]
    weights = reading.weight.square().sum(0)
    for factor in (1e-3, 1e3):
        readings = [apart[0], Reading(apart[1].weight, apart[1].gram, apart[1].unit, factor)]
        expected = weights * torch.tensor([1 + 4 * factor, 4 + factor], dtype=torch.float64)
        found = remove(readings, 2, 1, damping=SMALL)
        assert found.order.tolist() == [int(expected.argmin())] and float(found.errors[1]) == pytest.approx(float(expected.min()), rel=1e-6)


def test_units_to_keep_stay():
    readings, _, units = build("neurons")
    first = int(remove(readings, units, 1).order[0])
    keep = torch.zeros(units, dtype=torch.bool)
    keep[first] = True
    order = remove(readings, units, units - 1, keep=keep).order
    assert sorted([*order.tolist(), first]) == list(range(units))
    with pytest.raises(ValueError, match="at most the 4 that may go"):
        remove(readings, units, units, keep=keep)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("rows", [5, 300])
def test_large_matrices_brought_up_to_date_in_blocks_give_the_same(columns, rows, monkeypatch):
    """More columns than a block holds: the same order and errors as without blocks, and the errors of the repaired weights."""
    units = 240 // columns
    reading, x = problem(9, rows, [unit for unit in range(units) for _ in range(columns)], samples=500)
    reading = Reading(reading.weight, x @ x.T, torch.cat([reading.unit[:-1], torch.tensor([-1])]))
    found = remove([reading], units, units)
    monkeypatch.setattr(removal, "BLOCK", 1)
    plain = remove([reading], units, units)
    assert torch.equal(found.order, plain.order)
    torch.testing.assert_close(found.errors, plain.errors, rtol=1e-8, atol=1e-9 * float(found.errors[-1]))
    for n in (1, units // 2, units - 1, units):
        new = repaired(reading, found.order[:n])
        assert float(found.errors[n]) == pytest.approx(float(((reading.weight - new) @ x).square().sum()), rel=1e-6)


@pytest.mark.parametrize("samples", [1, 5])
def test_fewer_samples_than_columns_need_no_care(samples):
    """Some units cost nothing: the samples can be given by as many units as there are samples."""
    reading, x = problem(10, 4, list(range(12)), samples=samples)
    found = remove([reading], 12, 12, damping=0)
    assert bool(torch.isfinite(found.errors).all())
    assert float(found.errors[12 - samples]) < 1e-6 * float(found.errors[-1])
    assert float(found.errors[-1]) == pytest.approx(float((reading.weight @ x).square().sum()))


def test_a_gram_matrix_of_rounded_sums_is_made_definite():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(11)) * 1000
    gram = (x @ x.T).double() - 1e-4 * torch.eye(40)
    assert float(torch.linalg.eigvalsh(gram).min()) < 0
    found = remove([Reading(torch.ones(2, 40), gram, torch.arange(40))], 40, 40, damping=0)
    assert bool(torch.isfinite(found.errors).all()) and float(found.errors[37]) < 1e-3 * float(found.errors[40])


def test_nothing_to_remove_and_nobody_who_reads():
    readings, _, units = build("neurons")
    nothing = remove(readings, units, 0)
    assert nothing.order.tolist() == [] and nothing.errors.tolist() == [0]
    unread = remove([], 3, 2)
    assert len(set(unread.order.tolist())) == 2 and unread.errors.tolist() == [0, 0, 0]
    assert isinstance(unread, Removal)


def test_what_does_not_fit_is_refused():
    (reading,), _, units = build("neurons")
    with pytest.raises(ValueError, match="expected units below 4"):
        remove([reading], units - 1, 1)
    with pytest.raises(ValueError, match="5 columns has a Gram matrix"):
        remove([Reading(reading.weight, torch.eye(4).double(), reading.unit)], units, 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        remove([Reading(reading.weight * float("nan"), reading.gram, reading.unit)], units, 1)
    with pytest.raises(ValueError, match="at least 1 at a time"):
        remove([reading], units, 1, grain=0)
