"""Tuples whose items have names keep the names on their way: model, Network, saved network, file, loss and score."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from zoo import assert_close

import downsize as ds
from downsize.errors import ArtifactError, NetworkFileError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.trust import check_structure
from downsize.recipe import Recipe
from downsize.runtimes import RUNTIMES, open_artifact
from downsize.spool import Spool
from downsize.structure import flatten, unflatten
from downsize.task import Task
from downsize.training.devices import Devices


class Found(NamedTuple):
    scores: Tensor
    boxes: Tensor


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.scores, self.boxes = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, pair: Pair) -> Found:
        x = self.stem(pair.left + 2 * pair.right).relu()
        return Found(self.scores(x), self.boxes(x))


def batch(seed: int) -> tuple[Any, Tensor]:
    left, right = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))
    return (Pair(left, right),), left[:, :4]


def loss(outputs: Found, targets: Tensor) -> Tensor:
    return (outputs.boxes - targets).square().mean() + outputs.scores.square().mean()


def score(predict: Any, batches: Any) -> float:
    return -sum(float(loss(predict(inputs), targets)) for inputs, targets in batches)


def detector() -> tuple[Detector, Task]:
    model = Detector().eval()
    roles = {role: lambda seed=seed: iter([batch(seed), batch(seed + 1)]) for seed, role in enumerate(("calibrate", "train", "validate"))}
    return model, Task(model=model, example=batch(9)[0], data=roles, score=score, loss=loss)


def test_names_go_from_the_model_into_the_file(tmp_path):
    model, task = detector()
    inputs = batch(5)[0]
    expected = model(*inputs)
    network = capture(model, task.example)
    network.save(tmp_path / "network.safetensors")
    RUNTIMES["onnxruntime"].export(network, tmp_path / "model.onnx")
    for predict in (
        task.predict,
        network.predict,
        Network.load(tmp_path / "network.safetensors").predict,
        open_artifact(tmp_path / "model.onnx", "onnxruntime"),
    ):
        got: Any = predict(inputs)
        assert got._fields == ("scores", "boxes")
        assert_close(got.scores, expected.scores)
        assert_close(got.boxes, expected.boxes)


def test_a_loss_and_a_score_read_names():
    _, task = detector()
    network = capture(task.model, task.example)
    before = score(network.predict, task.batches("validate"))
    for step in Recipe.parse("finetune(epochs=10)"):
        network = step(network, task)
    assert score(network.predict, task.batches("validate")) > before


def test_targets_with_names_go_to_the_device_with_them():
    there = Devices(device=torch.device("meta")).there([Found(torch.ones(2), torch.ones(3))])
    assert isinstance(there[0], Found) and there[0].scores.device.type == there[0].boxes.device.type == "meta"


def test_data_on_disk_keeps_names():
    spool = Spool()
    spool.append((Pair(torch.zeros(2), torch.ones(3)), [1]))
    pair, rest = spool.read(0)
    assert isinstance(pair, Pair) and pair.right.tolist() == [1, 1, 1] and rest == [1]


@pytest.mark.slow
def test_a_run_from_the_task_to_the_verdict(tmp_path):
    _, task = detector()
    result = ds.run(task, "finetune(epochs=1) | quantize()", ds.Target(drop=1.0), into=tmp_path)
    assert result.verdict.met and result.artifact.path.exists()


def test_names_of_a_forged_file_are_never_code():
    structure = {"kind": "named", "keys": ["a b", "class", "_x"], "items": [{"kind": "tensor"}] * 3}
    assert unflatten(structure, [1, 2, 3]) == (1, 2, 3)
    with pytest.raises(NetworkFileError, match="the file is damaged"):
        check_structure({"kind": "named", "keys": ["a"], "items": [{"kind": "tensor"}] * 2}, 2, "outputs")


def test_a_faulty_leaf_is_told_by_its_name():
    with pytest.raises(ArtifactError, match=r"boxes is a set"):
        flatten(Found(torch.zeros(1), {1}))  # type: ignore[arg-type]
