"""What a model computes twice is one node of the Network, and one quantizer in its file: see ``network/repeats.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import assert_close, run

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.repeats import merge_repeats
from downsize.recipe import Recipe
from downsize.runtimes import RUNTIMES
from downsize.task import Task
from downsize.testing import simulation_equals_artifact


class Repeating(nn.Module):
    """Layers for forwards that call them more than once."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.stem = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.GRU(16, 16, 2, batch_first=True, dropout=0.3)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def images(rows: int) -> Tensor:
    return torch.randn(rows, 4, 16, generator=torch.Generator().manual_seed(1))


def calls(network: Network, word: str) -> int:
    return sum(word in str(node.target) for node in network.graph.nodes if node.op == "call_function")


def two_heads(self: Repeating, x: Tensor) -> Any:
    return self.head(self.one(x).relu()), self.two(self.one(x).relu())


def stem_of_each_head(self: Repeating, x: Tensor) -> Any:
    return self.one(self.stem(x)), self.two(self.stem(x))


def activation_of_each_reader(self: Repeating, x: Tensor) -> Any:
    return self.head(self.one(x.relu()) * self.two(x.relu()))


def behind_dropout(self: Repeating, x: Tensor) -> Any:
    return self.head(self.one(self.drop(x).relu()) * self.two(self.drop(x).relu()))


def one_output_twice(self: Repeating, x: Tensor) -> Any:
    return self.one(x), self.one(x)


FORWARDS = [two_heads, stem_of_each_head, activation_of_each_reader, behind_dropout, one_output_twice]


@pytest.mark.parametrize(
    ("forward", "recipe"),
    [*((forward, "quantize()") for forward in FORWARDS), (two_heads, "prune(macs=0.7) | quantize()"), (two_heads, "quantize(activations='dynamic')")],
)
def test_the_file_computes_the_networks_integers(forward, recipe, tmp_path):
    model, x = Repeating(forward).eval(), images(8)
    network = capture(model, x)
    task = Task(model=model, example=x, data={"calibrate": lambda: iter([(x, None)])})
    for step in Recipe.parse(recipe):
        network = step(network, task)
    RUNTIMES["onnxruntime"].export(network, tmp_path / "model.onnx")
    simulation_equals_artifact(network, tmp_path / "model.onnx", x)


def test_a_stem_that_two_heads_call_is_computed_once():
    model, x = Repeating(stem_of_each_head).eval(), images(3)
    network = capture(model, x)
    assert [calls(network, word) for word in ("conv1d", "batch_norm", "relu", "linear")] == [1, 1, 1, 2]
    assert_close(network.predict(x), run(model, x))


def test_the_same_in_training_with_statistics_that_move_once_a_step():
    model, x = Repeating(stem_of_each_head).eval(), images(6)
    network = capture(model, x).copy().train()
    model.train()
    momentum = 0.1
    moving = dict(model.named_buffers())["stem.1.running_mean"]
    before = moving.clone()
    assert_close(network(x), model(x), 1e-5)
    mean = model.stem[0](x).mean((0, 2))
    assert_close(network.tensor("stem.1.running_mean"), before + momentum * (mean - before))
    assert_close(moving, before + (1 - (1 - momentum) ** 2) * (mean - before))


def test_gradients_are_those_of_both_calls():
    model, x = Repeating(two_heads).eval(), images(6)
    network = capture(model, x).copy()
    for one, two in (network(x), model(x)):
        (one.square().sum() + two.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(network.tensor(name).grad, parameter.grad, 1e-5)


def noise(self: Repeating, x: Tensor) -> Any:
    return self.one(self.drop(x)) + self.two(self.drop(x))


def recurrent(self: Repeating, x: Tensor) -> Any:
    return self.one(self.rnn(x)[0]) + self.two(self.rnn(x)[0])


@pytest.mark.parametrize(("forward", "word"), [(noise, "dropout"), (recurrent, "gru")])
def test_what_training_draws_twice_stays_two(forward, word):
    network = capture(Repeating(forward).eval(), images(3))
    assert calls(network, word) == 2


def test_attention_without_dropout_is_one_and_with_it_two():
    def attend(self: Repeating, x: Tensor) -> Any:
        return self.one(F.scaled_dot_product_attention(x, x, x)) + self.two(F.scaled_dot_product_attention(x, x, x))

    network = capture(Repeating(attend).eval(), images(3))
    assert calls(network, "scaled_dot_product_attention") == 1
    first = next(node for node in network.graph.nodes if "scaled_dot" in str(node.target))
    reader = list(first.users)[-1]
    with network.graph.inserting_after(first):
        second = network.graph.node_copy(first)
    reader.replace_input_with(first, second)
    for dropout, users in ((0.1, 1), (0.0, 2)):
        first.args = second.args = (*first.args[:3], None, dropout)
        merge_repeats(network.graph)
        assert len(first.users) == users and len(second.users) == 2 - users


def written_between(self: Repeating, x: Tensor) -> Any:
    rows = self.one(x)
    view = rows[:, :1]
    before = self.two(rows)
    view.mul_(2.0)
    return before + self.two(rows)


def copy_is_written(self: Repeating, x: Tensor) -> Any:
    one, two = torch.zeros_like(x), torch.zeros_like(x)
    one[:, 0] = x[:, 0]
    return one + self.one(two)


def numbers_of_several_types(self: Repeating, x: Tensor) -> Any:
    whole = x.long()
    return (whole * 2).float() + whole * 2.0 + self.one(x / 0.0).isnan() + torch.stack([x / 0.0, x / -0.0]).sum(0).nan_to_num()


@pytest.mark.parametrize("forward", [written_between, copy_is_written, numbers_of_several_types])
def test_what_only_looks_the_same_stays(forward):
    model, x = Repeating(forward).eval(), images(3)
    assert_close(capture(model, x).predict(x), run(model, x))


def random_forward(seed: int) -> Callable[[Repeating, Tensor], Any]:
    """Eight values, each made of earlier ones by few operators, so that many are made twice; all are read."""
    rows = torch.randint(0, 60, (8, 3), generator=torch.Generator().manual_seed(seed)).tolist()

    def forward(self: Repeating, x: Tensor) -> Any:
        values = [x]
        for number, one, two in rows:
            a, b = values[one % len(values)], values[two % len(values)]
            ways = (self.one, self.two, torch.relu, torch.sigmoid, self.stem, lambda a, b=b: a + b, lambda a, b=b: a * torch.sigmoid(b))
            values.append(ways[number % len(ways)](a))
        return self.head(sum(values)), values[-1]

    return forward


@pytest.mark.parametrize("seed", range(6))
def test_random_repeats(seed, tmp_path):
    model, x = Repeating(random_forward(seed)).eval(), images(8)
    network = capture(model, x)
    keys = [(node.target, node.args, tuple(node.kwargs.items())) for node in network.graph.nodes if node.op == "call_function"]
    assert len({repr(key) for key in keys}) == len(keys)
    assert_close(network.predict(x), run(model, x))
    task = Task(model=model, example=x, data={"calibrate": lambda: iter([(x, None)])})
    for step in Recipe.parse("quantize()"):
        quantized = step(network, task)
    RUNTIMES["onnxruntime"].export(quantized, tmp_path / "model.onnx")
    simulation_equals_artifact(quantized, tmp_path / "model.onnx", x)
