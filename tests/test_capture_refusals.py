"""What capture refuses: with the user's line, the operator and the mend, and without a word on the screen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import Layer, captured

from downsize.errors import CaptureError
from downsize.network.capture import capture


def refusal(forward: Callable[..., Any], example: Any = None, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        captured(forward, example, **options)
    return str(caught.value)


class Branch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return x


class Item(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.sum().item()


class Condition(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (self.linear(x),))


@torch.library.custom_op("downsize_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("downsize_test::thrice", mutates_args=())
def thrice(x: Tensor) -> Tensor:
    return x * 3


@thrice.register_fake
def _(x: Tensor) -> Tensor:
    return x


class WithoutShapes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(twice(x))


class Custom(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(thrice(x))


@pytest.mark.parametrize(
    ("layer", "line", "operator", "mend"),
    [
        (Branch, "if x.sum() > 0:", "data-dependent", "torch.where"),
        (Item, "x.sum().item()", "aten.item", "torch.where"),
        (Condition, "torch.cond(", "cond", "torch.where"),
        (WithoutShapes, "self.linear(twice(x))", "downsize_test.twice", "register_fake"),
        (Custom, "self.linear(thrice(x))", "downsize_test.thrice", "ordinary torch operators"),
    ],
)
def test_refusals_name_the_line_the_operator_and_the_mend(layer, line, operator, mend, capfd):
    with pytest.raises(CaptureError) as caught:
        capture(layer(print).eval(), torch.randn(2, 4))
    text = str(caught.value)
    assert f"{__file__}:" in text and line in text and operator in text.replace("::", ".") and mend in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: self.linear(x) + torch.rand(4), "two different outputs"),
        (lambda self, x: (self.linear(x), x.shape[0]), "a number that is made from shapes"),
        (lambda self, x: 3.0, "returns no tensor"),
        (lambda self, x: {"a": object(), "b": (object(),), "c": x}, "The output cannot be described"),
        (lambda self, x: (torch.complex(x, x) * 1j).real, "complex"),
        (lambda self, x: x.nope(), "has no attribute 'nope'"),
    ],
)
def test_other_refusals(forward, words):
    assert words in refusal(forward)


def test_modules_that_are_not_ready_are_refused():
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module"):
        capture(print, torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match=r"in training mode \(at the model itself\)"):
        capture(nn.Linear(4, 4), torch.randn(2, 4))
    half_way = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    half_way[1].train()
    with pytest.raises(CaptureError, match=r"in training mode \(at 1\); call model\.eval\(\)"):
        capture(half_way, torch.randn(2, 4))
    with pytest.raises(CaptureError, match=r"weight lies on meta; expected cpu"):
        capture(nn.Linear(4, 4, device="meta").eval(), torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4).eval())
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(scripted, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ((), "holds no tensor"),
        ({"x": "text"}, "holds no tensor"),
        ((torch.zeros(2, 4), object()), "is a object; expected tensors"),
        (np.array(["a", "b"]), "Example 0: can't convert"),
        (torch.zeros(2, 5), "The model itself fails on example 0"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(example, words):
    assert words in refusal(lambda self, x, *more: self.linear(x), example)


def test_examples_of_different_kinds_are_refused():
    assert "differ in the number" in refusal(lambda self, x: self.linear(x), torch.zeros(2, 4), more=[torch.zeros(2, 3, 4)])


def test_a_hard_coded_dimension_is_refused():
    text = refusal(lambda self, x: x * 2 if x.shape[1] == 6 else x, torch.randn(2, 5), more=[torch.randn(2, 6)])
    assert "Input args_0: dimension 1 differs between your examples, but the model's code fixes it at 6" in text and "x.shape" in text
    text = refusal(lambda self, x: x * 2 if x.shape[1] == 5 else x, torch.randn(2, 5), more=[torch.randn(2, 6)])
    assert "another path for other inputs or sizes" in text


def test_state_is_refused():
    def forward(self: Layer, x: Tensor) -> Tensor:
        self.count.fill_(2.0)
        return self.linear(x) + self.count

    text = refusal(forward)
    assert "count" in text and "self.count.fill_(2.0)" in text and "an input and an output" in text


def test_an_example_that_the_model_does_not_take_is_named():
    text = refusal(lambda self, x: x.reshape(2, -1, 5), torch.randn(2, 5), more=[torch.randn(2, 5), torch.randn(2, 7)])
    assert "The model itself fails on example 2" in text and "x.reshape(2, -1, 5)" in text and f"{__file__}:" in text
