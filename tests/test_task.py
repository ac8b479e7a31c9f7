"""What a task accepts, what it refuses and with which words, and loading one from a file."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from downsize import scores
from downsize.errors import TaskError
from downsize.task import CALIBRATION_LOOK, Task, load_task, plain

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def batches(count: int = 3, size: int = 4, targets: bool = True) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator)
        yield inputs, torch.randint(0, 4, (size,), generator=generator) if targets else None


def task(**changes: Any) -> Task:
    given: dict[str, Any] = {"model": NET, "example": torch.zeros(1, 6), "data": {"calibrate": batches}, "score": scores.top1}
    return Task(**(given | changes))


def with_calibration(make: Any, **changes: Any) -> Task:
    return task(data={"calibrate": make}, score=None, **changes)


def test_a_sound_task_passes():
    data = {"calibrate": lambda: batches(targets=False), "train": batches, "validate": lambda: list(batches()), "test": batches}
    assert task(data=data).check() == ()
    assert task(example=(torch.zeros(1, 6),)).check() == ()
    assert task(score=None).check() == ()


def test_roles():
    assert (task().choice_role, task().verdict_role) == ("calibrate", "calibrate")
    more = task(data={"calibrate": batches, "validate": batches})
    assert (more.choice_role, more.verdict_role) == ("validate", "validate")
    assert task(data={"calibrate": batches, "test": batches}).verdict_role == "test"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": lambda x: x}, "model is a function; expected a torch.nn.Module"),
        ({"data": [batches]}, "data is a list; expected a dict"),
        ({"data": {"calibrate": batches, "valid": batches}}, "'valid', which is no role; did you mean 'validate'"),
        ({"data": {"calibrate": list(batches())}}, r"data\['calibrate'\] is a list; expected a function that returns it: lambda: loader"),
        ({"data": {"test": batches}}, '"calibrate" is required'),
        ({"score": 1}, "score is a int; expected a function"),
    ],
)
def test_wrong_kinds_are_refused_at_once(changes: dict[str, Any], words: str):
    with pytest.raises(TaskError, match=words):
        task(**changes)


# the model ----------------------------------------------------------------------------------------------------------------------


def test_training_mode_is_refused_with_the_mend():
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout())
    for refuse in (task(model=net).check, lambda: task(model=net).predict(torch.zeros(1, 6))):
        with pytest.raises(TaskError, match=r"training mode; expected evaluation mode: call model.eval\(\)"):
            refuse()
    net.eval()[1].train()
    with pytest.raises(TaskError, match=r"its part '1' \(Dropout\) is in training mode"):
        task(model=net).check()


def test_nan_in_weights_is_named():
    net = nn.Linear(6, 4).eval()
    with torch.no_grad():
        net.weight[1, 2] = float("inf")
    with pytest.raises(TaskError, match=r"the weight 'weight' has 1 of 24 values that are NaN or infinite"):
        task(model=net).check()


class Drawing(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, training=True)


class Reciprocal(nn.Module):
    """Not finite for the example only."""

    def forward(self, x):
        return 1 / x[:, :4].abs().sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (Drawing(), torch.ones(64, 6), "two runs of the model on the example differ"),
        (Reciprocal(), torch.zeros(1, 6), "output 0 for the example has 1 values that are NaN or infinite"),
        (NET, torch.zeros(1, 5), r"cannot run on inputs\[0\] float32 \[1, 5\]: RuntimeError"),
        (NET, torch.full((1, 6), torch.nan), r"the example: inputs\[0\] has 6 values that are NaN"),
        (NET, (3,), r"the example is \(3,\); expected the model's inputs"),
        (NET, torch.zeros(0, 6), r"expected at least one sample"),
        (NET, object(), r"the example: inputs\[0\] is a object; expected tensors"),
    ],
)
def test_an_example_that_does_not_work_is_refused(model: nn.Module, example: Any, words: str):
    with pytest.raises(TaskError, match=words):
        task(model=model.eval(), example=example).check()


# the data -----------------------------------------------------------------------------------------------------------------------


def broken() -> Iterator[Any]:
    yield from batches(1)
    raise FileNotFoundError("photo.jpg")


def third(inputs: Any) -> Any:
    return lambda: [*batches(2), (inputs, None)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (list, r"data\['calibrate'\] is empty; expected batches"),
        (lambda: None, r"data\['calibrate'\]\(\) gives a NoneType; expected an iterable"),
        (lambda: 1 / 0, r"data\['calibrate'\]\(\) raised ZeroDivisionError"),
        (broken, r"raised FileNotFoundError after 1 batches: photo.jpg"),
        (lambda: [torch.zeros(4, 6)], r"batch 1 of data\['calibrate'\] is a Tensor; expected a pair \(inputs, targets\)"),
        (lambda: [{"x": 1, "y": 2}], "is a dict of 2; expected a pair"),
        (third(torch.zeros(6)), r"batch 3 .* inputs\[0\] is float32 \[6\]; expected float32 with 2 dimensions, like the example's \[1, 6\]"),
        (third(torch.zeros(4, 6).double()), r"batch 3 .* is float64 \[4, 6\]; expected float32"),
        (third({"x": torch.zeros(4, 6)}), r"batch 3 .* has inputs\['x'\] float32 \[4, 6\]; expected inputs\[0\] float32 \[1, 6\]"),
        (third((torch.zeros(4, 6), torch.zeros(4))), r"batch 3 .* has inputs\[0\] float32 \[4, 6\], inputs\[1\] float32 \[4\]; expected"),
        (third(torch.zeros(0, 6)), r"batch 3 .* expected at least one sample"),
        (third([[0.0] * 6]), r"batch 3"),
        (third(torch.tensor([[1.0, torch.nan, 0, 0, torch.inf, 0]])), r"batch 3 .* inputs\[0\] has 2 values that are NaN or infinite"),
        (lambda: [*batches(2), *batches(1, targets=False)], "batches with and without targets"),
        (lambda: [(torch.zeros(4, 5), None)], r"the model cannot run on inputs\[0\] float32 \[4, 5\]"),
    ],
)
def test_bad_data_is_refused_by_number(make: Any, words: str):
    with pytest.raises(TaskError, match=words):
        with_calibration(make).check()


def test_a_constant_must_stay_what_it_was():
    class Scaled(nn.Module):
        def forward(self, x, factor):
            return x * factor

    good = with_calibration(lambda: [((x, 2), None) for x, _ in batches()], model=Scaled().eval(), example=(torch.ones(1, 6), 2))
    assert good.check() == ()
    with pytest.raises(TaskError, match=r"batch 1 .*: inputs\[1\] is 3; expected 2, as in the example"):
        with_calibration(lambda: [((x, 3), None) for x, _ in batches()], model=Scaled().eval(), example=(torch.ones(1, 6), 2)).check()


def test_a_used_up_iterator_is_refused():
    once = batches(3)
    with pytest.raises(TaskError, match="returns the same iterator at each call; expected a fresh iterable"):
        with_calibration(lambda: once).check()
    hidden = batches(3)
    with pytest.raises(TaskError, match="reads from an iterator that is used up: make the iterable inside the function"):
        with_calibration(lambda: map(tuple, hidden)).check()


def test_a_bounded_number_of_batches_is_read():
    read = {"calibrate": 0, "train": 0}

    def endless(role: str) -> Iterator[Any]:
        while True:
            read[role] += 1
            yield torch.zeros(2, 6), None

    assert task(data={role: lambda role=role: endless(role) for role in read}, score=None).check() == ()
    assert read["calibrate"] <= CALIBRATION_LOOK + 3
    assert read["train"] <= 6


def test_few_samples_and_shuffled_data_are_remarked():
    assert ["has 7 samples" in remark for remark in with_calibration(lambda: batches(1, size=7)).check()] == [True]
    generator = torch.Generator().manual_seed(0)
    shuffled = with_calibration(lambda: [(torch.randn(8, 6, generator=generator), None)])
    assert ["other batches at each call" in remark for remark in shuffled.check()] == [True]


def test_an_unknown_role_is_refused_at_once():
    with pytest.raises(TaskError, match=r"no data for 'validate'.* Known: calibrate"):
        task().batches("validate")


def test_variations_show_each_dimension_that_varies_once():
    def growing() -> Iterator[Any]:
        for length in (5, 5, 7, 9):
            yield {"mask": torch.ones(1, length), "ids": torch.zeros(1, length, dtype=torch.int64)}, None
        yield {"ids": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5)}, None

    example = {"ids": torch.zeros(1, 5, dtype=torch.int64), "mask": torch.ones(1, 5)}
    found = with_calibration(growing, example=example).variations()
    assert [tuple(inputs["ids"].shape) for inputs in found] == [(1, 7), (2, 5)]
    assert with_calibration(lambda: [(torch.ones(1, 6), None)]).variations() == []


# predictions and scores ---------------------------------------------------------------------------------------------------------


def test_predictions_keep_the_kind_of_tensor():
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = NET(x)
    as_torch, as_numpy = task().predict(x), task().predict(x.numpy())
    assert torch.equal(as_torch, expected)
    assert not as_torch.requires_grad
    assert isinstance(as_numpy, np.ndarray)
    assert np.array_equal(as_numpy, expected.numpy())
    frozen = x.numpy().copy()
    frozen.flags.writeable = False  # as arrays of mapped files are
    assert np.array_equal(task().predict(frozen[:, ::-1]), task().predict(frozen[:, ::-1].copy()))


def test_a_hugging_face_output_becomes_a_dict():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = transformers.BertModel(config).eval()
    ids = {"input_ids": torch.arange(10).reshape(2, 5)}
    outputs = Task(model=model, example=ids, data={"calibrate": lambda: [(ids, None)]}).predict(ids)
    assert type(outputs) is dict
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {"last_hidden_state": (2, 5, 8), "pooler_output": (2, 8)}


def test_plain_outputs():
    x = torch.ones(1)
    assert plain((x, [x, None], {"a": x, "b": None})) == (x, [x, None], {"a": x})
    with pytest.raises(TaskError, match=r"output\['cache'\] is a SimpleNamespace; expected tensors.*use_cache = False"):
        plain({"logits": x, "cache": SimpleNamespace()})
    with pytest.raises(TaskError, match="expected at least one tensor"):
        plain((1, None))


def test_a_score_of_nan_is_refused():
    with pytest.raises(TaskError, match=r"of the original model on data\['calibrate'\] is nan"):
        task(score=lambda predict, given: float("nan")).check()


def test_a_score_may_need_more_than_the_first_batches():
    def undefined_on_few(predict: Any, given: Any) -> float:
        return 1.0 if sum(len(predict(x)) for x, _ in given) == 20 else float("nan")

    assert task(data={"calibrate": lambda: batches(5)}, score=undefined_on_few).check() == ()


def test_a_score_without_targets_would_never_be_used():
    with pytest.raises(TaskError, match="all targets are None, so it would never be used"):
        task(data={"calibrate": lambda: batches(targets=False)}).check()


def test_roles_without_targets_are_not_asked_for_the_score():
    data = {"calibrate": lambda: batches(targets=False), "validate": lambda: batches(targets=False), "test": batches}
    assert task(data=data).check() == ()


# task files ---------------------------------------------------------------------------------------------------------------------

SOURCE = """
import neighbour
import torch
from downsize.task import Task
NET = torch.nn.Linear(neighbour.WIDTH, 2).eval()
def task():
    x = torch.zeros(1, neighbour.WIDTH)
    return Task(NET, x, {"calibrate": lambda: [(x, None)]}, name="from a file")
"""


def test_a_task_file_gives_its_task(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "neighbour.py").write_text("WIDTH = 3")
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    assert load_task(file).name == "from a file"
    file.write_text(SOURCE + "task = task()")
    assert tuple(load_task(str(file)).example.shape) == (1, 3)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "is no Python file; expected one that defines `task`"),
        ("x = 1\n", "defines task = None; expected a downsize.Task"),
        ("\n\ndef task():\n    return 1 / 0\n", r"mine.py, line 4, raised ZeroDivisionError: division by zero"),
        ("x = 1\nx x\n", r"mine.py, line 2, raised SyntaxError"),
        ("import nothing_of_this_name\n", r"mine.py, line 1, raised ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("from downsize.errors import TaskError\nraise TaskError('install the weights')\n", "^install the weights$"),
    ],
)
def test_a_task_file_that_fails_says_where(tmp_path, monkeypatch, source, words):
    monkeypatch.setattr("sys.path", [*sys.path])
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(TaskError, match=words):
        load_task(file)
