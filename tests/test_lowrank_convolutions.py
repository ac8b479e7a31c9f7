"""Convolutions in factors: against the dense convolution itself, the errors measured on the data of the Gram matrix, tensorly, and perturbation."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from downsize.numerics.lowrank_convolutions import FORMS, Convolution, Factored, macs_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorly
    from tensorly.decomposition import parafac, partial_tucker

# Name -> outputs, inputs, kernel, stride, padding, dilation, groups.
LAYERS = {
    "plain": (10, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "uneven": (8, 10, (3, 5), (2, 1), (0, 3), (1, 2), 1),
    "dilated, strided": (12, 5, (3, 3), (2, 3), (2, 1), (2, 1), 1),
    "groups": (12, 8, (3, 3), (2, 1), (1, 2), (1, 2), 2),
    "one input": (6, 1, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    "a row": (9, 6, (1, 3), (1, 2), (0, 1), (1, 1), 1),
    "one direction": (9, 6, (5,), (2,), (3,), (2,), 1),
    "one direction, groups": (12, 6, (3,), (1,), (1,), (1,), 3),
    "pointwise": (9, 6, (1, 1), (2, 1), (0, 0), (1, 1), 1),
    "pointwise, padded": (9, 6, (1, 1), (1, 1), (1, 2), (1, 1), 1),
}


def layer(name: str, seed: int = 0) -> Convolution:
    outputs, inputs, kernel, stride, padding, dilation, groups = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=generator, dtype=torch.float64)
    return Convolution(weight, stride, padding, dilation, groups)


def images(conv: Convolution, count: int = 12, seed: int = 1) -> torch.Tensor:
    """Inputs whose channels are correlated, of uneven size, smooth along each direction, and not of zero mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, conv.inputs, *(14,) * len(conv.kernel), generator=generator, dtype=torch.float64)
    for dim in range(2, x.dim()):
        x = x + 0.8 * x.roll(1, dim)
    mixed = torch.randn(conv.inputs, conv.inputs, generator=generator, dtype=torch.float64)
    x = torch.einsum("ij,nj...->ni...", mixed * torch.logspace(0, -1, conv.inputs, dtype=torch.float64), x)
    return (x + 0.5).relu()


def run(factors: tuple[Convolution, ...], x: torch.Tensor) -> torch.Tensor:
    apply = functional.conv1d if x.dim() == 3 else functional.conv2d
    for factor in factors:
        x = apply(x, factor.weight, None, factor.stride, factor.padding, factor.dilation, factor.groups)
    return x


def gram_of(conv: Convolution, x: torch.Tensor) -> torch.Tensor:
    """[groups, columns + 1, columns + 1], from torch's own unfolding."""
    x, kernel, dilation, padding, stride = (
        (x[:, :, None], (1, *conv.kernel), (1, *conv.dilation), (0, *conv.padding), (1, *conv.stride))
        if x.dim() == 3
        else (x, conv.kernel, conv.dilation, conv.padding, conv.stride)
    )
    columns = functional.unfold(x, kernel, dilation, padding, stride)
    columns = columns.reshape(len(x), conv.groups, -1, columns.shape[2]).permute(1, 2, 0, 3).flatten(2)
    columns = torch.cat([columns, columns.new_ones(conv.groups, 1, columns.shape[2])], 1)
    return columns @ columns.mT


def measured(conv: Convolution, made: Factored, x: torch.Tensor) -> float:
    """The squared error of the factors' outputs, the shift added, as a part of the centred outputs'."""
    y = run((conv,), x)
    dims = (0, *range(2, y.dim()))
    missed = y - run(made.factors, x) - made.shift.reshape(-1, *(1,) * (y.dim() - 2))
    return float(missed.square().sum() / (y - y.mean(dims, keepdim=True)).square().sum())


def applying(name: str) -> list[str]:
    return [form for form in FORMS if FORMS[form].most_of(layer(name))]


CASES = [(name, form) for name in LAYERS for form in applying(name)]


# Exactness -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_full_rank_is_the_convolution_itself(name, form, data):
    conv = layer(name)
    x = images(conv)
    # Two images leave most Gram matrices singular.
    made = FORMS[form].factor(conv, FORMS[form].most_of(conv), gram_of(conv, x[:2]) if data else None)
    dense = run((conv,), x)
    shift = made.shift.reshape(-1, *(1,) * (x.dim() - 2))
    assert float((run(made.factors, x) + shift - dense).norm() / dense.norm()) < 1e-5
    assert made.error < 1e-10


@pytest.mark.parametrize(("name", "form"), CASES)
def test_errors_are_those_measured_on_the_data_of_the_gram_matrix(name, form):
    conv = layer(name)
    x = images(conv)
    solve = FORMS[form].prepare(conv, gram_of(conv, x), damping=0.01)
    most = FORMS[form].most_of(conv)
    for part in (0.2, 0.6):
        made = solve(tuple(max(1, int(part * rank)) for rank in most))
        assert made.error == pytest.approx(measured(conv, made, x), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_without_data_errors_are_those_of_the_weight(name, form):
    conv = layer(name)
    made = FORMS[form].factor(conv, tuple(max(1, rank // 2) for rank in FORMS[form].most_of(conv)))
    dense = torch.cat(dense_of(made, conv))
    assert made.error == pytest.approx(float((dense - conv.weight).square().sum() / conv.weight.square().sum()), rel=1e-9, abs=1e-12)
    assert not made.shift.any()


def dense_of(made: Factored, conv: Convolution) -> list[torch.Tensor]:
    """The weights of the convolution that the factors are, of each group: what they give for single ones in the input."""
    found = []
    one, none = (1,) * len(conv.kernel), (0,) * len(conv.kernel)
    for group in range(conv.groups):
        # Without stride, padding and dilation, so that one input position meets every tap.
        plain = [replace(f, stride=one, padding=none, dilation=one) for f in made.factors]
        own = conv.weight.shape[1]
        x = torch.zeros(own, conv.inputs, *(2 * size - 1 for size in conv.kernel), dtype=torch.float64)
        for number in range(own):
            x[(number, group * own + number, *(size - 1 for size in conv.kernel))] = 1
        y = run(tuple(plain), x).flip(*range(2, x.dim()))
        rows = len(conv.weight) // conv.groups
        found.append(y[:, group * rows : (group + 1) * rows].transpose(0, 1))
    return found


@pytest.mark.parametrize(("name", "form"), CASES)
def test_more_rank_is_no_more_error(name, form):
    conv = layer(name)
    for gram in (None, gram_of(conv, images(conv))):
        solve, most = FORMS[form].prepare(conv, gram), FORMS[form].most_of(conv)
        errors = [solve(tuple(max(1, round(part * rank)) for rank in most)).error for part in (0.1, 0.2, 0.4, 0.7, 1)]
        # Canonical terms and trains have many local optima, so one more rank may find a slightly worse one.
        slack = 1.02 if form in ("cp", "tensor_train") else 1 + 1e-9
        assert all(after <= slack * before + 1e-12 for before, after in itertools.pairwise(errors))
        assert errors[-1] < 1e-10 < errors[0]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_data_beat_the_weight_alone(name, form):
    conv = layer(name)
    x = images(conv)
    # CP has many more terms than would pay.
    ranks = tuple(max(1, rank // (8 if form == "cp" else 2)) for rank in FORMS[form].most_of(conv))
    fitted, plain = (FORMS[form].factor(conv, ranks, gram) for gram in (gram_of(conv, x), None))
    assert measured(conv, fitted, x) < 0.8 * measured(conv, plain, x)


# Optimality ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("form", ["channel", "spatial", "tucker", "separable", "tensor_train"])
def test_no_factors_nearby_are_much_better(form, data):
    """At an optimum a random step of any factor does not lower the error by more than what alternating leaves."""
    conv = layer("plain")
    x = images(conv) if data else torch.randn(400, 6, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made = FORMS[form].factor(conv, tuple(max(1, rank // 2) for rank in FORMS[form].most_of(conv)), gram_of(conv, x))
    generator = torch.Generator().manual_seed(4)
    for number, factor in enumerate(made.factors):
        for size in (1e-1, 1e-2, 1e-3):
            for _ in range(5):
                step = size * factor.weight.std() * torch.randn(factor.weight.shape, generator=generator, dtype=torch.float64)
                near = replace(factor, weight=factor.weight + step)
                factors = (*made.factors[:number], near, *made.factors[number + 1 :])
                assert measured(conv, Factored(factors, made.shift, 0.0), x) > made.error * (1 - 1e-4)


def test_the_last_factor_is_the_least_squares_one():
    """numpy's own least squares on what the first factors give finds nothing better."""
    conv = layer("plain")
    x = images(conv)
    y = run((conv,), x).transpose(0, 1).flatten(1).numpy()
    for form in ("channel", "cp", "separable"):
        made = FORMS[form].factor(conv, tuple(max(1, rank // 2) for rank in FORMS[form].most_of(conv)), gram_of(conv, x))
        inner = run(made.factors[:-1], x).transpose(0, 1).flatten(1).numpy()
        inner = np.concatenate([inner, np.ones((1, inner.shape[1]))])
        _, residual, rank, _ = np.linalg.lstsq(inner.T, y.T, rcond=None)
        assert rank == len(inner)
        assert made.error == pytest.approx(residual.sum() / np.square(y - y.mean(1, keepdims=True)).sum(), rel=1e-4)


def test_spatial_and_separable_are_singular_value_decompositions_without_data():
    conv = layer("uneven")
    weight = conv.weight.numpy()
    rows = weight.transpose(0, 3, 1, 2).reshape(8 * 5, 10 * 3)
    values = np.square(np.linalg.svd(rows, compute_uv=False))
    assert FORMS["spatial"].factor(conv, (7,)).error == pytest.approx(values[7:].sum() / values.sum(), rel=1e-8)
    values = np.square(np.linalg.svd(weight.transpose(1, 0, 2, 3).reshape(10, 8, 15), compute_uv=False))
    assert FORMS["separable"].factor(conv, (2,)).error == pytest.approx(values[:, 2:].sum() / values.sum(), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [(2, 3), (4, 4), (3, 8)])
def test_tucker_is_not_worse_than_tensorlys(ranks, seed):
    conv = layer("plain", seed)
    (core, parts), _ = partial_tucker(conv.weight.numpy(), [ranks[1], ranks[0]], modes=[0, 1], n_iter_max=200, tol=1e-12)
    theirs = np.einsum("sryx,os,ir->oiyx", core, *parts)
    error = np.square(theirs - conv.weight.numpy()).sum() / np.square(conv.weight.numpy()).sum()
    assert FORMS["tucker"].factor(conv, ranks).error <= 1.01 * error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [4, 12, 24])
def test_cp_is_not_much_worse_than_tensorlys(rank, seed):
    """Both stop in local optima; ours is one that does not cancel."""
    conv = layer("plain", seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a start that is filled up with random numbers
        theirs = tensorly.cp_to_tensor(parafac(conv.weight.numpy(), rank, n_iter_max=100, init="svd", tol=1e-9, random_state=0))
    error = np.square(theirs - conv.weight.numpy()).sum() / np.square(conv.weight.numpy()).sum()
    assert FORMS["cp"].factor(conv, (rank,)).error <= 1.25 * error


def test_cp_finds_a_planted_sum():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (10, 6, 3, 3)]
    conv = Convolution(torch.einsum("or,ir,yr,xr->oiyx", *parts), (1, 1), (1, 1), (1, 1))
    assert FORMS["cp"].factor(conv, (6,)).error < 1e-3


def test_cp_does_not_cancel_where_there_is_no_best_sum():
    """De Silva and Lim 2008: a a b + a b a + b a a has rank 3 and sums of two terms as near as one likes, whose terms grow without end."""
    a, b = torch.eye(3, dtype=torch.float64)[:2]
    weight = sum(torch.einsum("o,i,y->oiy", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a)))
    assert isinstance(weight, torch.Tensor)
    conv = Convolution(weight[..., None].expand(-1, -1, -1, 2).contiguous(), (1, 1), (1, 1), (1, 1))
    made = FORMS["cp"].factor(conv, (2,))
    first, height, width, last = (factor.weight.flatten(1) for factor in made.factors)
    terms = first.norm(dim=1) * height.norm(dim=1) * width.norm(dim=1) * last.norm(dim=0)
    assert float(terms.square().sum()) < 20 * float(conv.weight.square().sum())
    assert made.error < 1 / 3 + 1e-6  # what two of the three terms leave


# Balance, costs, refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_inner_channels_are_of_the_size_of_the_weights_that_read_them(form, scale):
    conv = layer("plain")
    conv = replace(conv, weight=conv.weight * scale)
    x = images(conv)
    made = FORMS[form].factor(conv, tuple(max(1, rank // 3) for rank in FORMS[form].most_of(conv)), gram_of(conv, x))
    inner = run(made.factors[:1], x)
    given = (inner - inner.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3)).sqrt()
    reads = made.factors[-1 if form == "cp" else 1].weight.transpose(0, 1).flatten(1).norm(dim=1)
    # Borders are padded for one direction and not for the other, and CP's vectors between have length 1.
    assert bool(((given / reads).log().abs() < 1.0).all())


@pytest.mark.parametrize(("name", "form"), CASES)
def test_ranks_worth_trying_cost_less_and_fall(name, form):
    conv = layer(name)
    size = (200,) * len(conv.kernel)
    ranks = FORMS[form].ranks(conv)
    assert len(set(ranks)) == len(ranks) <= 40
    costs = []
    for each in ranks:
        factors = FORMS[form].factor(conv, each).factors
        costs.append(sum(factor.parameters for factor in factors))
        # Positions of a large input, so that borders and rounded strides are a few percent.
        assert costs[-1] < conv.parameters or macs_of(factors, size) < 1.1 * macs_of((conv,), size)
    assert costs == sorted(costs, reverse=True)


def test_ranks_follow_the_grain():
    conv = Convolution(torch.zeros(64, 48, 3, 3), (1, 1), (1, 1), (1, 1))
    for form in ("channel", "spatial", "tucker", "tensor_train", "cp"):
        ranks = FORMS[form].ranks(conv, 8)
        assert ranks and all(rank % 8 == 0 for each in ranks for rank in each)
    grouped = Convolution(torch.zeros(64, 16, 3, 3), (1, 1), (1, 1), (1, 1), 4)
    assert all(
        4 * rank % 8 == 0
        for form in ("channel", "spatial", "tucker", "tensor_train", "cp")
        for each in FORMS[form].ranks(grouped, 8)
        for rank in each
    )
    uneven = Convolution(torch.zeros(96, 32, 3, 3), (1, 1), (1, 1), (1, 1), 3)
    assert FORMS["channel"].ranks(uneven, 8) == [(24,), (16,), (8,)]
    small = Convolution(torch.zeros(12, 6, 3, 3), (1, 1), (1, 1), (1, 1))
    assert [rank for (rank,) in FORMS["channel"].ranks(small, 8)] == [8, 4]


def test_macs_are_weights_times_positions():
    conv = layer("uneven")
    x = images(conv, 1)
    assert tuple(run((conv,), x).shape[2:]) == conv.output_size((14, 14))
    made = FORMS["tucker"].factor(conv, (3, 4))
    middle = run(made.factors[:2], x).shape[2] * run(made.factors[:2], x).shape[3]
    assert macs_of(made.factors, (14, 14)) == 3 * 10 * 14 * 14 + (4 * 3 * 15 + 8 * 4) * middle


@pytest.mark.parametrize(
    ("form", "shape", "groups"),
    [
        ("spatial", (8, 8, 1, 1), 1),
        ("tucker", (8, 8, 1, 1), 1),
        ("cp", (8, 8, 1), 1),
        ("separable", (8, 8, 1, 1), 1),
        ("spatial", (8, 8, 5), 1),
        ("tensor_train", (8, 8, 1, 3), 1),
    ]
    + [(form, (8, 1, 3, 3), 8) for form in FORMS],
)
def test_forms_that_do_not_apply_offer_no_ranks_and_refuse(form, shape, groups):
    dims = len(shape) - 2
    conv = Convolution(torch.ones(shape), (1,) * dims, (0,) * dims, (1,) * dims, groups)
    assert FORMS[form].ranks(conv) == []
    with pytest.raises(ValueError, match="does not apply"):
        FORMS[form].factor(conv, (1,))


def test_ranks_and_grams_that_do_not_fit_are_refused():
    conv = layer("groups")
    for ranks in ((0,), (7,), (1, 1)):
        with pytest.raises(ValueError, match="expected 1 to"):
            FORMS["channel"].factor(conv, ranks)
    with pytest.raises(ValueError, match="expected one for each"):
        FORMS["channel"].factor(conv, (2,), torch.eye(37))
    with pytest.raises(ValueError, match="Gram matrix"):
        FORMS["channel"].factor(conv, (2,), torch.eye(36).expand(2, -1, -1))


def test_rounding_of_a_gram_matrix_in_single_precision_is_borne():
    """Inputs far from zero mean and half of them alike: the covariance that is left is a little off, and not quite positive."""
    conv = layer("plain")
    x = images(conv)
    x = (x - x.mean()) / x.std() + 10
    x[:, 3:] = x[:, :3]
    gram = gram_of(conv, x.float()).double()
    for form in FORMS:
        ranks = tuple(max(1, rank // (8 if form == "cp" else 2)) for rank in FORMS[form].most_of(conv))
        exact = FORMS[form].factor(conv, ranks, gram_of(conv, x))
        assert measured(conv, FORMS[form].factor(conv, ranks, gram), x) < 1.1 * exact.error + 1e-4


def test_a_large_layer_is_fitted_in_fewer_rounds_and_still_exactly_at_full_rank():
    weight = torch.randn(192, 160, 3, 3, generator=torch.Generator().manual_seed(0))
    conv = Convolution(weight, (1, 1), (1, 1), (1, 1))
    solve = FORMS["separable"].prepare(conv)
    assert solve((9,)).error < 1e-10
    values = np.square(np.linalg.svd(weight.numpy().transpose(1, 0, 2, 3).reshape(160, 192, 9), compute_uv=False))
    assert solve((2,)).error == pytest.approx(values[:, 2:].sum() / values.sum(), rel=1e-5)


def test_factors_keep_the_dtype_and_a_weight_of_zeros_stays_one():
    conv = Convolution(torch.zeros(6, 5, 3, 3), (1, 1), (1, 1), (1, 1))
    for form in FORMS:
        for gram in (None, torch.eye(46)):
            made = FORMS[form].factor(conv, tuple(1 for _ in FORMS[form].most_of(conv)), gram)
            assert all(factor.weight.dtype == torch.float32 and bool(factor.weight.isfinite().all()) for factor in made.factors)
            assert made.error == 0 and not run(made.factors, torch.ones(1, 5, 4, 4)).any()
