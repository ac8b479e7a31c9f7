"""Trains of tensors: against the tensor itself, the accuracy that was asked for, and tensorly."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from downsize.numerics.lowrank_trains import joined, train

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorly
    from tensorly.decomposition import tensor_train

SHAPES = [(7,), (5, 8), (4, 6, 3, 3), (3, 2, 4, 2, 3)]


def tensor_of(shape: tuple[int, ...]) -> torch.Tensor:
    """Neighbours alike, so that ranks can be cut."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dim in range(noise.dim()):
        noise = noise.cumsum(dim)
    return noise


@pytest.mark.parametrize("shape", SHAPES)
def test_without_limits_it_is_the_tensor(shape):
    tensor = tensor_of(shape)
    cores = train(tensor)
    assert [core.shape[1] for core in cores] == list(shape)
    assert cores[0].shape[0] == cores[-1].shape[2] == 1
    torch.testing.assert_close(joined(cores), tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("accuracy", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_error_is_within_the_accuracy_and_costs_less(shape, accuracy):
    tensor = tensor_of(shape)
    cores, whole = train(tensor, accuracy=accuracy), train(tensor)
    assert float((joined(cores) - tensor).norm() / tensor.norm()) <= accuracy
    # To a hundredth nothing can be left out of these.
    assert accuracy < 0.1 or sum(core.numel() for core in cores) < sum(core.numel() for core in whole)


@pytest.mark.parametrize("ranks", [(2, 3, 2), (4, 9, 3), (1, 1, 1), (3, 18, 3)])
def test_ranks_give_tensorlys_train(ranks):
    tensor = tensor_of((4, 6, 3, 3))
    cores = train(tensor, ranks)
    theirs = tensor_train(tensor.numpy(), [1, *ranks, 1])
    assert [tuple(core.shape) for core in cores] == [tuple(core.shape) for core in theirs]
    np.testing.assert_allclose(joined(cores).numpy(), tensorly.tt_to_tensor(theirs), atol=1e-9)


def test_a_planted_train_is_found():
    generator = torch.Generator().manual_seed(1)
    planted = [torch.randn(r, n, s, generator=generator, dtype=torch.float64) for r, n, s in ((1, 5, 2), (2, 6, 3), (3, 7, 1))]
    found = train(joined(planted), accuracy=1e-10)
    assert [core.shape for core in found] == [core.shape for core in planted]
    torch.testing.assert_close(joined(found), joined(planted), rtol=0, atol=1e-9)


def test_cores_keep_the_dtype_and_zeros_are_zeros():
    cores = train(torch.zeros(3, 4, 5), accuracy=0.1)
    assert {core.dtype for core in cores} == {torch.float32}
    assert [core.shape for core in cores] == [(1, 3, 1), (1, 4, 1), (1, 5, 1)]
    assert not joined(cores).any()


@pytest.mark.parametrize(("shape", "ranks"), [((), None), ((3, 4), (1, 2)), ((3, 4), (0,))])
def test_ranks_that_do_not_fit_are_refused(shape, ranks):
    with pytest.raises(ValueError, match="expected"):
        train(torch.ones(shape), ranks)
