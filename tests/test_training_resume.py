"""A training that was stopped goes on and gives, bit for bit, what an uninterrupted one gives; a checkpoint that cannot do that is not used."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from training_nets import Pulse, Scaled, Signals, network_of, noisy, parts, samples, shuffled, smooth, task_of

from downsize.errors import TrainingError
from downsize.network.network import Network
from downsize.progress import Progress
from downsize.task import Task
from downsize.techniques.finetune import Finetune
from downsize.training.plan import Training

BIAS = "5.bias"
PLAN = Training(steps=11, rate=1e-2, every=3, average=0.9, decay=0.1)


def trained(plan: Training, task: Task, *steps: int, number: int = signal.SIGINT) -> tuple[Network, Scaled, Pulse]:
    """One call of a training with an objective and a hook of its own, in which the signal comes behind these steps."""
    network = network_of(task)
    objective, pulse = Scaled(network, task), Pulse(BIAS)
    return plan.train(network, task, objective, [pulse, Signals(*steps, number=number)]), objective, pulse


def steps_of(task: Task, plan: Training) -> int:
    """How many steps one more call makes."""
    made: list[int] = []

    class Counts(Signals):
        def after(self, learner: Any) -> None:
            made.append(learner.step)

    Counts.__qualname__ = Signals.__qualname__  # it is the same training
    network = network_of(task)
    plan.train(network, task, Scaled(network, task), [Pulse(BIAS), Counts()])
    return len(made)


def file_in(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize(
    "plan",
    [PLAN, replace(PLAN, optimizer="sgd", average=None, schedule="linear", every=None, steps=None, epochs=2, renormalise=True)],
    ids=["adamw", "sgd"],
)
def test_stopped_again_and_again_it_gives_the_same_bits(tmp_path, plan):
    task = task_of(noisy())
    wanted, objective, pulse = trained(plan, task)
    task = replace(task, checkpoints=tmp_path)
    stops = sorted(random.Random(plan.optimizer).sample(range(1, 11), 3))
    for stop in stops:
        torch.rand(stop)  # the caller's generator is of no account
        with pytest.raises(KeyboardInterrupt):
            trained(plan, task, stop)
        assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    found, resumed, pulsed = trained(plan, task, *stops)  # those steps are done: no signal comes
    assert found.fingerprint() == wanted.fingerprint()
    assert all(torch.equal(value, resumed.state()[name]) for name, value in objective.state().items())
    assert torch.equal(pulse.seen, pulsed.seen)
    assert wanted.fingerprint() != network_of(task).fingerprint()


def test_a_finished_training_is_not_done_again(tmp_path):
    task = task_of(noisy(), checkpoints=tmp_path)
    wanted, _, _ = trained(PLAN, task)
    assert steps_of(task, PLAN) == 0
    assert trained(PLAN, task)[0].fingerprint() == wanted.fingerprint()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Twice(Signals):
        def after(self, learner: Any) -> None:
            super().after(learner)
            super().after(learner)
            reached.append(learner.step)

    reached: list[int] = []
    task = task_of(noisy(), checkpoints=tmp_path)
    network = network_of(task)
    with pytest.raises(KeyboardInterrupt):
        PLAN.train(network, task, hooks=[Twice(2)])
    assert reached == [1] and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_step_keeps_the_finished_training_and_stops(tmp_path):
    task = task_of(noisy(), checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(PLAN, task, 11)
    assert steps_of(task, PLAN) == 0


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "a bit":
        data[-5] ^= 1
        path.write_bytes(data)
    elif kind == "text":
        path.write_text("hello")
    else:
        path.write_bytes(b"")


def test_with_a_damaged_checkpoint_it_begins_anew(tmp_path):
    wanted = trained(PLAN, task_of(noisy()))[0].fingerprint()
    task = task_of(noisy(), checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(PLAN, task, 7)
    whole = file_in(tmp_path).read_bytes()
    assert steps_of(task, PLAN) == 4
    for kind in ("truncated", "a bit", "text", "empty"):
        file_in(tmp_path).write_bytes(whole)
        damage(file_in(tmp_path), kind)
        assert steps_of(task, PLAN) == 11, kind
    file_in(tmp_path).write_bytes(whole[:-100])
    said = StringIO()
    assert trained(PLAN, replace(task, progress=Progress(stream=said)))[0].fingerprint() == wanted
    assert f"the checkpoint {file_in(tmp_path)} is damaged, or of another training: training begins anew" in said.getvalue()


def test_the_checkpoint_of_another_training_is_not_believed_under_a_wrong_name(tmp_path):
    task = task_of(noisy(), checkpoints=tmp_path / "a")
    other = replace(task, checkpoints=tmp_path / "b")
    for one, plan in ((task, PLAN), (other, replace(PLAN, rate=2e-2))):
        with pytest.raises(KeyboardInterrupt):
            trained(plan, one, 7)
    file_in(tmp_path / "b").replace(file_in(tmp_path / "a"))
    assert steps_of(task, PLAN) == 11


def test_other_data_begins_anew_and_says_so(tmp_path):
    said = StringIO()
    task = task_of(noisy(), checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(PLAN, task, 7)
    changed = replace(task, data={**task.data, "train": lambda: shuffled(size=9)}, progress=Progress(stream=said))
    wanted = trained(PLAN, replace(changed, checkpoints=None, progress=None))[0].fingerprint()
    assert trained(PLAN, changed)[0].fingerprint() == wanted
    assert 'data["train"] gives other batches than before the interruption: training begins anew' in said.getvalue()


def fewer_classes(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets.clamp(max=1))


def smoothed(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


class Weighed(Scaled):
    def __init__(self, task: Task, weight: float) -> None:
        super().__init__(network_of(task), task)
        self.weight = weight


def networks_of(task: Task) -> list[Network]:
    """As it is, with a frozen tensor, with zeros, and with zeros that must stay."""
    network = network_of(task)
    frozen, sparse = network.copy(), network.copy()
    frozen.tensor("0.bias").requires_grad_(False)
    with torch.no_grad():
        sparse.tensor("3.weight")[0] = 0
    masked = sparse.copy()
    masked.keep_zeros("3.weight")
    return [network, frozen, sparse, masked]


def test_whatever_changes_a_training_gives_it_another_checkpoint(tmp_path):
    def files() -> int:
        return len(list(tmp_path.iterdir()))

    base = task_of(smooth(), checkpoints=tmp_path)
    plan = Training(steps=1)
    network, *others = networks_of(base)
    tasks = [replace(base, models={"teacher": model}) for model in (noisy(), smooth())]
    tasks += [replace(base, loss=loss) for loss in (fewer_classes, smoothed)]
    tasks.append(replace(base, data={**base.data, "validate": lambda: parts(seed=6)}))
    calls = [
        lambda: plan.train(network, base),
        lambda: plan.train(network, base, Weighed(base, 1.0)),
        lambda: plan.train(network, base, Weighed(base, 0.5)),
        lambda: plan.train(network, base, hooks=[Pulse("3.bias")]),
        lambda: plan.train(network, base, hooks=[Pulse("0.bias")]),
        lambda: replace(plan, seed=1).train(network, base),
        lambda: plan.train(network, base, share=(0.0, 0.5)),
        *(lambda one=one: plan.train(one, base) for one in others),
        *(lambda one=one: plan.train(network, one) for one in tasks),
    ]
    for number, call in enumerate(calls, start=1):
        call()
        assert files() == number
    for call in calls[:3]:
        call()
    replace(plan, minutes=1).train(network, base)  # how often it is kept changes nothing
    assert files() == len(calls)


def test_a_folder_that_cannot_be_made_is_an_error_with_the_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"the checkpoint .* cannot be written \(.*\): free some space, or give another folder"):
        trained(PLAN, task_of(noisy(), checkpoints=tmp_path / "file" / "folder"))


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(tmp_path):
    task = task_of(noisy(), checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(PLAN, task, 4)
    before = file_in(tmp_path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(TrainingError, match="cannot be written"):
            trained(PLAN, task, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file_in(tmp_path).read_bytes() == before


def test_training_does_not_draw_from_the_callers_generators():
    task = task_of(noisy())
    network = network_of(task)
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    Finetune(steps=2, every=1, renormalise=True)(network, task)
    Training(steps=2, average=0.5).train(network, task)
    assert torch.equal(torch.rand(3), wanted)


TASK = """
import os, signal
import torch
from training_nets import noisy, parts, shuffled
import downsize as ds

STEPS = []

def loss(outputs, targets):
    STEPS.append(1)
    if str(len(STEPS)) == os.environ.get("STOP"):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return torch.nn.functional.cross_entropy(outputs, targets)

data = {"calibrate": parts, "train": shuffled, "validate": lambda: parts(seed=5)}
task = ds.Task(noisy(), parts()[0][0][:2], data, ds.scores.top1, loss=loss)
"""
RECIPE = "finetune(epochs=3, rate=1e-2, minutes=0, average=0.9) | quantize(activations='dynamic')"


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    task = folder.parent / "task.py"
    task.write_text(TASK)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    call = [sys.executable, "-m", "downsize.cli", "run", str(task), RECIPE, "--into", str(folder)]
    return subprocess.run(call, env=variables, capture_output=True, text=True)


def networks(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (folder / "steps").glob("*/network.safetensors")}


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_a_training_and_leaves_no_checkpoint(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    plain = run(one)
    assert plain.returncode == 0, plain.stderr
    stopped = run(other, STOP="7", SIGNAL="SIGINT")
    assert stopped.returncode == 130 and "stopped behind step 7 of 18" in stopped.stderr
    assert len(list((other / "checkpoints").glob("*/*.safetensors"))) == 1
    killed = run(other, STOP="5", SIGNAL="SIGKILL")
    assert killed.returncode == -9 and "going on behind step 7 of 18" in killed.stderr
    resumed = run(other)
    assert resumed.returncode == 0 and "going on behind step 11 of 18" in resumed.stderr, resumed.stderr
    assert networks(one) == networks(other) and len(networks(one)) == 3
    assert not (other / "checkpoints").exists() and not (one / "checkpoints").exists()


def test_samples_can_be_learned():
    images, classes = samples()
    assert set(classes.tolist()) == {0, 1, 2} and images.shape == (42, 1, 4, 4)
