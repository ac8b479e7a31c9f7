"""A step that trains is built again when anything that training depends on has changed, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from training_nets import noisy, parts, shuffled, smooth, task_of

from downsize.bench import Bench, digest_of
from downsize.engine import Run
from downsize.progress import Progress
from downsize.recipe import Recipe
from downsize.runtimes import RUNTIMES
from downsize.target import Target
from downsize.task import Task


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    task = replace(task_of(smooth()), models={"teacher": noisy()}, loss=nn.functional.cross_entropy)
    with Run(tmp_path_factory.mktemp("run"), {"task": "keys"}) as run:
        yield Bench.set_up(task, Target(), RUNTIMES["onnxruntime"], run, Progress(quiet=True))


def key(bench: Bench, task: Task, recipe: str) -> str:
    """Of the one step of a recipe, built or found."""
    (technique,) = Recipe.parse(recipe)
    return replace(bench, task=task, keys={})._apply(technique, recipe, bench.original).key


def with_data(task: Task, **data: object) -> Task:
    return replace(task, data={**task.data, **data})  # pyright: ignore[reportArgumentType]


def half(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) / 2


def test_whatever_training_reads_is_in_the_key(bench):
    task = bench.task
    relabelled = [(images, (classes + 1) % 3) for images, classes in parts()]
    changed = copy_of_smooth()
    next(changed.parameters()).data.add_(1)
    tasks = {
        "as it is": task,
        "train inputs": with_data(task, train=lambda: parts(seed=9)),
        "train targets": with_data(task, train=lambda: relabelled),
        "validate inputs": with_data(task, validate=lambda: parts(seed=9)),
        "validate targets": with_data(task, validate=lambda: relabelled),
        "no validate": replace(task, data={role: entry for role, entry in task.data.items() if role != "validate"}),
        "loss": replace(task, loss=half),
        "no loss": replace(task, loss=None),
        "models": replace(task, models={"teacher": changed}),
        "names of models": replace(task, models={"student": noisy()}),
        "score": replace(task, score=lambda predict, batches: 0.5),
    }
    keys = {what: key(bench, one, "finetune(steps=0)") for what, one in tasks.items()}
    assert len(set(keys.values())) == len(keys)
    again = replace(task, data={**task.data, "train": lambda: list(shuffled())})  # the same batches from other code
    assert key(bench, again, "finetune(steps=0)") == keys["as it is"]
    only_calibrate = replace(task, data={"calibrate": parts})
    other_targets = replace(task, data={"calibrate": lambda: relabelled})
    assert key(bench, only_calibrate, "finetune(steps=0)") != key(bench, other_targets, "finetune(steps=0)")


def copy_of_smooth() -> nn.Sequential:
    with torch.random.fork_rng():
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).eval()


def test_what_does_not_train_does_not_read_it(bench):
    def forbidden():
        raise AssertionError("read")

    task = with_data(bench.task, train=forbidden, validate=forbidden)
    plain = "quantize(activations='dynamic')"
    assert key(bench, task, plain) == key(bench, bench.task, plain)


def test_plans_inside_other_steps_train_too(bench):
    other = with_data(bench.task, train=lambda: parts(seed=9))
    for recipe in ("sparsify(sparsity=0.5, keep_ends=False, train=finetune(steps=2))", "prune(macs=0.8, multiple=1, tune=finetune(steps=0))"):
        assert key(bench, bench.task, recipe) != key(bench, other, recipe)


def test_checkpoints_are_gone_when_the_step_is_finished(bench):
    key(bench, bench.task, "finetune(steps=3, minutes=0)")
    assert not (bench.run.folder / "checkpoints").exists()


def test_targets_of_any_kind_have_a_hash():
    inputs = torch.zeros(2, 3)
    kinds = [None, torch.ones(2), [1, 2], [2, 1], {"a": torch.ones(2)}, [{"boxes": torch.ones(1)}, {"boxes": torch.zeros(1)}], ["cat", "dog"]]
    assert len({digest_of([(inputs, kind)], targets=True) for kind in kinds}) == len(kinds)
    assert digest_of([(inputs, 1)]) == digest_of([(inputs, 2)])
