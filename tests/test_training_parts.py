"""Hashes that tell trainings apart, rows of a batch for several processes, normalisations in training."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_nets import network_of, noisy, samples, smooth, task_of

from downsize.errors import RuntimeMissing
from downsize.network.capture import capture
from downsize.techniques.finetune import Finetune
from downsize.training.devices import Devices, rows_of
from downsize.training.digest import digest, digest_of_settings
from downsize.training.norms import alone, moving, to_training
from downsize.training.objective import Objective

# Hashes ---------------------------------------------------------------------------------------------------------------------------

WEIGHT = 0.5


def helper(x):
    return x * WEIGHT


def loss(outputs, targets):
    return helper(outputs).sum()


def test_values_count_and_places_do_not():
    one = {"a": [1, 2.5, None, "x"], "b": (torch.arange(3), np.arange(3.0)), "c": {3, 1, 2}}
    assert digest(one) == digest(copy.deepcopy(one)) != digest({**one, "a": [1, 2.5, None, "y"]})
    assert digest(torch.arange(3)) != digest(torch.arange(3).int()) != digest(torch.arange(3)[None].int())
    assert digest(torch.ones(2, dtype=torch.bfloat16)) != digest(torch.zeros(2, dtype=torch.bfloat16))
    assert digest(np.array(["a"])) != digest(np.array(["b"]))
    assert digest([1], [2]) != digest([1, 2]) != digest((1, 2))
    assert digest(torch.arange(6).reshape(2, 3).T) == digest(torch.arange(6).reshape(2, 3).T.contiguous())


def test_functions_count_by_their_code_and_what_it_refers_to(monkeypatch):
    before = digest(loss)
    monkeypatch.setattr(sys.modules[__name__], "WEIGHT", 0.25)
    changed = digest(loss)
    monkeypatch.undo()
    assert digest(loss) == before != changed

    def weighed(weight):
        return lambda outputs, targets: (outputs * weight).sum()

    assert digest(weighed(1.0)) == digest(weighed(1.0)) != digest(weighed(2.0))
    functional = nn.functional
    assert digest(lambda o, t: functional.mse_loss(o, t)) != digest(lambda o, t: functional.l1_loss(o, t))
    assert digest(lambda o, t: [x + 1 for x in o]) != digest(lambda o, t: [x + 2 for x in o])
    assert digest(functools.partial(loss, 1)) != digest(functools.partial(loss, 2))
    assert digest(lambda o, t, weight=1: o) != digest(lambda o, t, weight=2: o)


def test_modules_and_settings_count_by_type_state_and_attributes():
    assert digest(nn.CrossEntropyLoss()) == digest(nn.CrossEntropyLoss()) != digest(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert digest(smooth()) == digest(copy.deepcopy(smooth())) != digest(noisy())
    changed = copy.deepcopy(smooth())
    next(changed.parameters()).data.add_(1)
    assert digest(smooth()) != digest(changed)
    assert digest(Finetune()) == digest(Finetune(epochs=None)) != digest(Finetune(epochs=1))
    assert digest(SimpleNamespace(a=1)) == digest(SimpleNamespace(a=2))  # by its type: what it holds may be anything


def test_what_holds_itself_has_a_hash():
    one: list = [1]
    one.append(one)
    assert digest(one) == digest(one)

    def again(n):
        return again(n - 1) if n else 0

    assert digest(again)


def test_objectives_count_by_their_settings_and_those_of_their_parts():
    class Weighed(Objective):
        def __init__(self, weight: float, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.weight, self.inner, self.network = weight, inner, network_of(task_of(smooth()))
            self.start = nn.Parameter(torch.randn(3))  # drawn at random: not a setting

    assert digest_of_settings(Weighed(1.0)) == digest_of_settings(Weighed(1.0)) != digest_of_settings(Weighed(2.0))
    assert digest_of_settings(Weighed(1.0, nn.Dropout(0.1))) != digest_of_settings(Weighed(1.0, nn.Dropout(0.2)))


def test_hashes_are_equal_in_another_process():
    here = digest(loss, smooth(), {"b", "a", "c"}, nn.CrossEntropyLoss(), [1.5, "x"])
    code = "import test_training_parts as t; print(t.digest(t.loss, t.smooth(), {'b', 'a', 'c'}, t.nn.CrossEntropyLoss(), [1.5, 'x']))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


# Several processes ----------------------------------------------------------------------------------------------------------------


@given(count=st.integers(2, 4), size=st.integers(1, 12))
def test_parts_make_up_the_batch_and_their_weighed_means_its_mean(count, size):
    values = torch.arange(size, dtype=torch.float64) ** 2
    parts = [Devices(rank, count).part({"x": values[:, None], "all": torch.ones(99)}, values, size) for rank in range(count)]
    means = [float(targets.mean()) * weight for _, targets, weight in parts]
    assert sum(means) / count == pytest.approx(float(values.mean()))
    assert all(torch.equal(inputs["x"][:, 0], targets) and len(targets) >= min(2, size) for inputs, targets, _ in parts)
    if size >= 2 * count:
        assert sorted(torch.cat([targets for _, targets, _ in parts]).tolist()) == values.tolist()
    else:
        assert all(len(targets) == size for _, targets, _ in parts)


def test_rows_of_every_kind_of_batch():
    rows, size = [0, 2], 3
    array, tensor = np.arange(6).reshape(3, 2), torch.arange(3)
    found = rows_of({"a": array, "b": (tensor, "name", 5), "c": [{"box": 1}, {"box": 2}, {"box": 3}]}, rows, size)
    assert found["a"].tolist() == [[0, 1], [4, 5]]
    assert found["b"][0].tolist() == [0, 2] and found["b"][1:] == ("name", 5)
    assert found["c"] == [{"box": 1}, {"box": 3}]
    assert rows_of(["cat", "dog", "owl"], rows, size) == ["cat", "owl"]
    assert [one.tolist() for one in rows_of([tensor, tensor, tensor], rows, size)] == [[0, 2]] * 3  # three inputs, not three samples
    assert rows_of(None, rows, size) is None and rows_of(torch.ones(4), rows, size).shape == (4,)


def test_one_process_takes_all_as_it_is():
    inputs, targets = samples()
    found = Devices().part(inputs, targets, 42)
    assert found[0] is inputs and found[1] is targets and found[2] == 1.0
    assert Devices().main and not Devices(rank=1, count=2).main


def test_several_processes_without_accelerate_are_refused_with_the_mend(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RuntimeMissing, match=r'pip install "downsize\[train\]"'):
        Devices.found()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Devices.found() == Devices()


# Normalisations -------------------------------------------------------------------------------------------------------------------


def norms() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).eval()


def test_a_single_value_a_channel_is_found_where_torch_refuses_it():
    torch.manual_seed(0)
    model, tail = norms(), nn.Sequential(*list(norms())[:3], nn.Flatten(), nn.Linear(64, 3)).eval()
    for one, refused in ((model, True), (tail, False)):
        network = capture(one, samples()[0][:2])
        assert not alone(network, [samples()[0][:1]])  # in evaluation mode
        to_training(network, "train", lambda name: False)
        before = [tensor.clone() for tensor in moving(network)]
        assert alone(network, [samples()[0][:1]]) == refused
        assert not alone(network, [samples()[0][:2]])
        assert all(torch.equal(tensor, value) for tensor, value in zip(moving(network), before, strict=True))
        twin = copy.deepcopy(one).train()
        if refused:
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                twin(samples()[0][:1])
        else:
            twin(samples()[0][:1])


def test_frozen_norms_do_not_move():
    network = capture(norms(), samples()[0][:2])
    to_training(network, "train", lambda name: name.startswith("1."))
    assert [id(tensor) for tensor in moving(network)] == [id(network.tensor(name)) for name in ("4.running_mean", "4.running_var")]
    to_training(network, "freeze", lambda name: False)
    assert moving(network) == []
    to_training(network, "train", lambda name: False)
    assert len(moving(network)) == 4
