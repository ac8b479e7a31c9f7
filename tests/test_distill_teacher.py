"""A teacher's outputs that are kept: the same as computed ones, bounded, only where rows stand alone, and part of a checkpoint."""

from __future__ import annotations

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from zoo import specimen

from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.training.answers import Answers
from downsize.training.teacher import Teacher


class Counting:
    """A predict function that counts the rows it was asked for."""

    def __init__(self, function):
        self.function, self.rows = function, 0

    def __call__(self, inputs):
        outputs = self.function(inputs)
        first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
        self.rows += len(first)
        return outputs


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_no_sample_is_computed_twice_however_batches_are_made():
    layer, data = linear(), rows(20)
    predict = Counting(lambda x: {"one": layer(x), "two": (x * 2,)})
    answers = Answers(predict)
    answers(data[:4])
    asked = predict.rows
    for order in (torch.arange(20), torch.randperm(20, generator=torch.Generator().manual_seed(1))):
        for part in order.split(5):
            one, two = answers(data[part])
            assert torch.allclose(one, layer(data[part]), rtol=0, atol=1e-6) and torch.equal(two, data[part] * 2)
    assert predict.rows - asked == 16
    # the one trial of whether rows stand alone: the whole first batch again, and two of its rows
    assert asked == 4 + 4 + 2
    assert not one.requires_grad


def test_a_sample_that_comes_twice_in_one_batch_is_computed_once():
    layer, data = linear(), rows(3)
    predict = Counting(layer)
    answers = Answers(predict)
    answers(data)
    asked = predict.rows
    (found,) = answers(torch.cat([rows(1, 5), data, rows(1, 5)]))
    assert predict.rows - asked == 1 and torch.equal(found[0], found[4])
    assert torch.allclose(found, layer(torch.cat([rows(1, 5), data, rows(1, 5)])), rtol=0, atol=1e-6)


def test_inputs_with_other_values_types_or_lengths_are_other_samples():
    predict = Counting(lambda inputs: inputs["ids"].double().sum(1, keepdim=True) + inputs["mask"].double().sum(1, keepdim=True))
    answers = Answers(predict)
    ids = torch.tensor([[1, 2, 0], [3, 4, 5]])
    answers({"ids": ids, "mask": (ids > 0).long()})
    for other in ({"ids": ids, "mask": torch.ones_like(ids)}, {"ids": ids.int(), "mask": (ids > 0).long()}):
        (found,) = answers(other)
        assert torch.equal(found, predict.function(other))
    longer = {"ids": torch.cat([ids, torch.zeros(2, 1).long()], 1), "mask": torch.cat([(ids > 0).long(), torch.zeros(2, 1).long()], 1)}
    asked = predict.rows
    answers(longer)
    assert predict.rows - asked == 2


def test_rows_that_depend_on_each_other_are_not_kept():
    predict = Counting(lambda x: x - x.mean(0))
    answers = Answers(predict)
    for _ in range(2):
        (found,) = answers(rows(5))
        assert torch.equal(found, rows(5) - rows(5).mean(0))
    assert answers.usable is False and not answers.parts


def test_outputs_without_the_batch_first_are_not_kept():
    answers = Answers(lambda x: (x, x.sum()))
    one, total = answers(rows(5))
    assert answers.usable is False and torch.equal(one, rows(5)) and torch.equal(total, rows(5).sum())


def test_a_batch_of_one_decides_nothing():
    layer = linear()
    answers = Answers(layer)
    answers(rows(1))
    assert answers.usable is None
    answers(rows(3))
    assert answers.usable is True


def test_bytes_are_bounded_and_what_fits_is_still_used():
    layer, data = linear(), rows(40)
    predict = Counting(layer)
    answers = Answers(predict, limit=10 * (4 * 4 + 256))
    answers(data[:5])
    for part in data.split(5):
        answers(part)
    assert answers.bytes <= answers.limit and len(answers.places) == 10
    asked = predict.rows
    for part in data.split(5):
        (found,) = answers(part)
        assert torch.allclose(found, layer(part), rtol=0, atol=1e-6)
    assert predict.rows - asked == 30


def test_it_gives_up_where_no_sample_comes_again():
    layer = linear()
    answers = Answers(layer, limit=10 * (4 * 4 + 256))
    for seed in range(20):
        answers(rows(5, seed))
    assert answers.usable is False and answers.bytes == 0 and not answers.places and not answers.parts
    (found,) = answers(rows(5, 3))
    assert torch.equal(found, layer(rows(5, 3)))


def test_its_state_goes_through_a_file_of_tensors():
    layer, data = linear(), rows(20)
    one = Answers(lambda x: (layer(x), x.long()))
    for part in data.split(6):
        one(part)
    state = load(save({name: value for name, value in one.state_dict().items()}))
    assert all(isinstance(value, Tensor) for value in one.state_dict().values())

    def never(inputs):
        raise AssertionError("asked for a sample that was kept")

    two = Answers(never)
    two.load_state_dict(state)
    for part in data.flip(0).split(7):
        for before, after in zip(one(part), two(part), strict=True):
            assert torch.equal(before, after)
    assert (two.usable, two.bytes, two.strangers, list(two.places)) == (one.usable, one.bytes, one.strangers, list(one.places))


def test_an_empty_state_comes_back_empty():
    one, two = Answers(linear()), Answers(linear())
    two(rows(4))
    two.load_state_dict(one.state_dict())
    assert two.usable is None and not two.places and not two.parts and two.bytes == 0


# Values inside ------------------------------------------------------------------------------------------------------------------------


def test_a_teacher_gives_inner_values_and_outputs_without_gradients():
    model, network = specimen("residual")
    teacher = Teacher(network.predict, network, ("relu__2", "conv2d"))
    inputs = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs, values = teacher(inputs)
    seen = {}
    nodes = {node.name: node for node in network.graph.nodes}
    keep = {nodes[name]: (lambda args, value, name=name: seen.__setitem__(name, value.clone())) for name in ("relu__2", "conv2d")}
    expected = walk(network, [inputs], keep)
    assert torch.equal(outputs[0], expected[0]) and set(values) == {"relu__2", "conv2d"}
    assert all(torch.equal(values[name], seen[name]) and not values[name].requires_grad for name in values)
    with torch.no_grad():
        assert torch.allclose(outputs[0], model(inputs), atol=1e-5)


def test_numpy_inputs_are_taken_too():
    _, network = specimen("plain")
    assert isinstance(network, Network)
    inputs = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for teacher in (Teacher(network.predict), Teacher(network.predict, network, ("conv2d",))):
        found, _ = teacher(inputs.numpy())
        assert torch.allclose(found[0], network.predict(inputs), atol=1e-6)
