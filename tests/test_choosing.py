"""Training against the closed form: what validation prefers is kept, and what goes wrong there costs no training."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from digits_task import batches, digits, mlp, task_of
from torch import nn

import downsize as ds
from downsize.errors import AllocationError, TaskError
from downsize.network.network import Network
from downsize.progress import Progress
from downsize.scores import top1
from downsize.techniques.factorize import Factorize
from downsize.techniques.finetune import Finetune
from downsize.techniques.sparsify import Sparsify
from downsize.training.choosing import better

TECHNIQUES = (Sparsify(sparsity=0.96, keep_ends=False), Factorize(macs=0.12, multiple=1))
SLIGHT, LONG = Finetune(steps=2, rate=1e-6), Finetune(epochs=15, rate=5e-3)


def started(validate: bool = True) -> tuple[Network, ds.Task, io.StringIO]:
    said, task = io.StringIO(), task_of(mlp())
    data = {"calibrate": lambda: batches(0, 512), "train": lambda: batches(0, 1000)}
    if validate:
        data["validate"] = lambda: batches(1000, 1400)
    return ds.capture(mlp(), digits()[0][:2]), dataclasses.replace(task, data=data, progress=Progress(stream=said)), said


def score(network: Network) -> float:
    return top1(network.predict, batches(1000, 1400))


@pytest.mark.parametrize("technique", TECHNIQUES, ids=["sparsify", "factorize"])
def test_a_training_that_gives_back_too_little_is_not_kept(technique: Any):
    """Oracle: the score of the closed form by itself, on the same data for "validate"."""
    network, task, said = started()
    solved = technique(network, task)
    slight = dataclasses.replace(technique, train=SLIGHT)(network, task)
    assert slight.fingerprint() == solved.fingerprint() and "the closed form is kept" in said.getvalue()


@pytest.mark.parametrize("technique", TECHNIQUES, ids=["sparsify", "factorize"])
def test_a_training_that_learns_is_kept(technique: Any):
    """From random weights, which a closed form can only imitate."""
    torch.manual_seed(0)
    random = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    _, task, said = started()
    task, network = dataclasses.replace(task, model=random), ds.capture(random, task.example)
    made = dataclasses.replace(technique, train=LONG)(network, task)
    assert score(made) > score(technique(network, task)) + 0.2 and "kept" not in said.getvalue()


def test_without_data_to_judge_on_the_trained_network_is_kept():
    network, task, said = started(validate=False)
    technique = Sparsify(sparsity=0.9, keep_ends=False, train=SLIGHT)
    made = technique(network, task)
    assert {how["method"] for how in made.origin["sparsified"].values()} == {"trained"} and "kept" not in said.getvalue()


@pytest.mark.parametrize("error", [TaskError, AllocationError, MemoryError, ArithmeticError, RuntimeError])
def test_a_closed_form_that_cannot_be_costs_no_training(error: type[Exception]):
    network, task, said = started()

    def refused() -> Network:
        raise error("there is only one calibration sample")

    assert better(task, network, refused) is network
    assert "not compared with the closed form: there is only one calibration sample" in said.getvalue()


def test_a_closed_form_without_a_score_costs_no_training():
    network, task, said = started()
    broken = network.copy()
    with torch.no_grad():
        broken.tensor("5.bias").fill_(float("nan"))
    score = lambda predict, data: float(predict(next(iter(data))[0]).sum())  # noqa: E731
    assert better(dataclasses.replace(task, score=score), network, lambda: broken) is network
    assert "not compared with the closed form" in said.getvalue()


def test_both_are_judged_on_the_same_draw():
    """Oracle: equal networks have equal scores, so that the trained one stays, whatever the data draws."""
    network, task, _ = started()
    drawn = dataclasses.replace(task, data={**task.data, "validate": lambda: iter([(torch.randn(300, 1, 8, 8), torch.randint(10, (300,)))])})
    for seed in range(5):
        torch.manual_seed(seed)
        assert better(drawn, network, network.copy) is network


def test_what_is_drawn_before_does_not_change_the_closed_form():
    """Oracle: the same call from another state of torch's generator."""
    network, task, said = started()
    drawn = dataclasses.replace(task, data={**task.data, "calibrate": lambda: iter([(digits()[0][torch.randperm(512)[:128]], None)])})
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(Sparsify(sparsity=0.9, keep_ends=False, train=SLIGHT, samples=128, holdout=32)(network, drawn).fingerprint())
    assert made[0] == made[1] and said.getvalue().count("the closed form is kept") == 2
