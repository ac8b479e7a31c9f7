"""Convolutions as trains of cores: against tensorly's trains, planted ones, and what ranks neighbours can fill."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_lowrank_convolutions import gram_of, images, layer

from downsize.numerics.lowrank_convolutions import FORMS, Convolution

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorly
    from tensorly.decomposition import tensor_train


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [(2, 4, 3), (4, 6, 5), (3, 9, 8), (5, 12, 7)])
def test_a_tensor_train_is_not_worse_than_tensorlys(ranks, seed):
    conv = layer("plain", seed)
    cores = tensor_train(conv.weight.permute(1, 2, 3, 0).numpy(), [1, *ranks, 1])
    theirs = np.moveaxis(np.asarray(tensorly.tt_to_tensor(cores)), 3, 0)
    error = np.square(theirs - conv.weight.numpy()).sum() / np.square(conv.weight.numpy()).sum()
    assert FORMS["tensor_train"].factor(conv, ranks).error <= error * (1 + 1e-9)


@pytest.mark.parametrize("data", [False, True])
def test_a_planted_tensor_train_is_found(data):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 6), (4, 3, 3), (3, 4, 3), (10, 3))]
    conv = Convolution(torch.einsum("ri,sry,tsx,qt->qiyx", *parts), (1, 1), (1, 1), (1, 1))
    made = FORMS["tensor_train"].factor(conv, (3, 4, 3), gram_of(conv, images(conv)) if data else None)
    assert made.error < 1e-8
    assert [tuple(factor.weight.shape) for factor in made.factors] == [(3, 6, 1, 1), (4, 3, 3, 1), (3, 4, 1, 3), (10, 3, 1, 1)]


def test_ranks_of_a_train_are_none_that_neighbours_cannot_fill():
    conv = layer("plain")
    for r, s, t in FORMS["tensor_train"].ranks(conv):
        weight = [factor.weight.flatten(1) for factor in FORMS["tensor_train"].factor(conv, (r, s, t)).factors]
        assert [len(part) for part in weight] == [r, s, t, 10]
        assert [int(torch.linalg.matrix_rank(part)) for part in weight] == [r, s, t, t]


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 3), (3, 64)])
def test_a_train_of_few_inputs_or_outputs_has_ranks_worth_trying(outputs, inputs):
    conv = Convolution(torch.zeros(outputs, inputs, 3, 3), (1, 1), (1, 1), (1, 1))
    assert FORMS["tensor_train"].most_of(conv) == (min(inputs, 27), 9, min(outputs, 27))
    assert len(FORMS["tensor_train"].ranks(conv)) > 1
