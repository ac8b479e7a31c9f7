"""Batches found again: seek gives the batch that would have come, whatever was drawn in between, and leaves the caller's generators alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from downsize.errors import TaskError
from downsize.training.stream import Stream, drawing, set_states, states


def augmented():
    """Batches in an order from Python's generator, with noise from numpy's and torch's, drawn when each is asked for."""
    numbers = list(range(5))
    random.shuffle(numbers)
    for number in numbers:
        yield number, np.random.rand(3), torch.rand(3)


LOADER = DataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True)


def loaded():
    for (rows,) in LOADER:
        yield rows + torch.randint(0, 100, (len(rows),))


def text(batch: object) -> str:
    return repr([part.tolist() if hasattr(part, "tolist") else part for part in batch]) if isinstance(batch, tuple) else repr(batch)


def everything(make, epochs: int) -> list[list[str]]:
    """All batches of the first epochs, read in one go."""
    stream, found = Stream(make, 7), [[] for _ in range(epochs + 1)]
    while stream.epoch < epochs:
        batch = stream.next()
        found[stream.epoch].append(text(batch))
    return found[:epochs]


@pytest.mark.parametrize("make", [augmented, loaded])
@settings(max_examples=20)
@given(data=st.data())
def test_seek_finds_the_same_batch_whatever_was_drawn_in_between(make, data):
    wanted = everything(make, 3)
    stream = Stream(make, 7)
    for _ in range(4):
        epoch = data.draw(st.integers(0, 2))
        number = data.draw(st.integers(0, len(wanted[epoch]) - 1))
        random.seed(data.draw(st.integers(0, 99)))
        np.random.seed(data.draw(st.integers(0, 99)))
        torch.manual_seed(data.draw(st.integers(0, 99)))
        stream.seek(epoch, number)
        for later in range(number, min(number + 3, len(wanted[epoch]))):
            torch.rand(data.draw(st.integers(1, 3)))
            assert text(stream.next()) == wanted[epoch][later]
        assert (stream.epoch, stream.number) == (epoch, min(number + 3, len(wanted[epoch])))


def test_epochs_and_seeds_differ():
    first, second, _ = everything(augmented, 3)
    assert len(first) == len(second) == 5 and not set(first) & set(second)
    other = Stream(augmented, 8)
    assert text(other.next()) != first[0]


def test_the_place_behind_the_last_batch_leads_into_the_next_epoch():
    wanted = everything(augmented, 2)
    stream = Stream(augmented, 7)
    stream.seek(0, 5)
    assert text(stream.next()) == wanted[1][0]
    assert (stream.epoch, stream.number) == (1, 1)


def test_seek_ends_where_the_epoch_has_fewer_batches_than_once():
    stream = Stream(augmented, 7)
    stream.seek(0, 9)
    assert (stream.epoch, stream.number) == (1, 1)


def test_the_callers_generators_are_left_as_they_were():
    def drawn() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    wanted = drawn()
    seed()
    stream = Stream(augmented, 7)
    for _ in range(7):
        stream.next()
    stream.seek(2, 3)
    assert stream.length() == 5
    with drawing("anything"):
        assert drawn() != wanted
    assert drawn() == wanted


def test_they_are_put_back_behind_an_error_too():
    def broken():
        torch.rand(5)
        raise ValueError("no disk")

    torch.manual_seed(3)
    wanted = states()
    with pytest.raises(ValueError, match="no disk"):
        Stream(broken, 0).next()
    assert torch.equal(wanted[2], torch.get_rng_state())
    set_states(wanted)


def test_the_length_is_told_or_counted_and_does_not_move_the_place():
    assert Stream(lambda: [1, 2, 3], 0).length() == 3
    assert Stream(lambda: iter([1, 2, 3]), 0).length() == 3
    assert Stream(lambda: LOADER, 0).length() == 4
    stream = Stream(augmented, 7)
    wanted = everything(augmented, 1)[0]
    assert [text(stream.next()), stream.length(), text(stream.next())] == [wanted[0], 5, wanted[1]]


def test_counting_ends_where_the_steps_do():
    def endless():
        while True:
            yield 1

    assert Stream(endless, 0).length(12) == 12


def test_an_epoch_without_batches_is_refused():
    calls = []

    def once():
        calls.append(1)
        return iter([1] if len(calls) == 1 else [])

    stream = Stream(once, 0)
    assert stream.next() == 1
    with pytest.raises(TaskError, match="gave no batch in an epoch"):
        stream.next()


def test_what_was_seen_tells_batches_apart():
    stream, other = Stream(augmented, 7), Stream(augmented, 7)
    seen = [(stream.next(), stream.seen())[1] for _ in range(7)]
    assert len(set(seen)) == 7
    other.seek(1, 2)
    assert other.seen() == seen[6]
