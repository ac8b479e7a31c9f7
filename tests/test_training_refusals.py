"""What cannot be trained on is refused with what came, what was expected and the mend: targets, types, batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_nets import CLASSES, network_of, parts, smooth, task_of

import downsize as ds
from downsize.errors import TaskError
from downsize.network.capture import capture
from downsize.task import Task
from downsize.techniques.finetune import Finetune


@pytest.mark.parametrize("targets", [None, {"classes": [1]}, ["one"]])
def test_batches_whose_targets_are_no_numbers_are_refused(targets):
    mixed = [parts()[0], (parts()[1][0], targets)]
    task = task_of(smooth(), data={"train": lambda: mixed, "validate": None})
    with pytest.raises(TaskError, match=rf"targets are {type(targets).__name__}; expected class numbers \[8\], in every batch"):
        Finetune(steps=2)(network_of(task), task)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_refused_unless_they_are_frozen(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES)).to(dtype).eval()
    pairs = [(torch.ones(8, 4, dtype=dtype), torch.zeros(8, dtype=torch.long))]
    task = Task(model, pairs[0][0], {"calibrate": lambda: pairs}, ds.scores.top1)
    with pytest.raises(TaskError, match=f"The weight 0.weight is {str(dtype)[6:]}, .* call model.float\\(\\) before"):
        Finetune(steps=1)(capture(model, task.example), task)
    with pytest.raises(TaskError, match=r"The weight 1\.weight"):
        Finetune(steps=1, freeze=("0.*",))(capture(model, task.example), task)
