"""Techniques that train, in recipes with the others: zeros survive, the laws hold, rounds meet their amount."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_task import batches, convolutional, digits, mlp, task_of
from small_nets import like
from torch import nn
from zoo import BY_NAME, specimen

import downsize as ds
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import aten
from downsize.pruning.costs import macs_of
from downsize.pruning.structure import give_biases
from downsize.recipe import Recipe
from downsize.techniques import TECHNIQUES
from downsize.techniques.finetune import Finetune
from downsize.techniques.prune import Prune
from downsize.testing import loaded_equals_live, simulation_equals_artifact
from downsize.training.hook import Hook, Learner
from downsize.training.plan import Training


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def digits_chain(model: nn.Module) -> tuple[Network, ds.Task]:
    task = task_of(model)
    return capture(model, digits()[0][:2]), dataclasses.replace(task, data={**task.data, "train": lambda: batches(0, 1000)})


def zoo_chain(name: str) -> tuple[Network, ds.Task]:
    model, network = specimen(name)
    data = [(BY_NAME[name].inputs(batch), None) for batch in (4, 3, 5, 6)]
    return network, ds.Task(model, BY_NAME[name].inputs(2), {"calibrate": lambda: data})


def accuracy(network: Network) -> float:
    return sum(int((network.predict(x).argmax(1) == y).sum()) for x, y in batches(1400, 1797)) / 397


def applied(recipe: str, network: Network, task: ds.Task) -> list[Network]:
    made = [network]
    for technique in Recipe.parse(recipe, TECHNIQUES):
        made.append(technique(made[-1], task))
    return made


# Recipes on the zoo ----------------------------------------------------------------------------------------------------------------

ZOO = ("plain", "residual", "depthwise", "dense", "vit", "lstm", "tied")
FAST = ("residual", "vit")
CHAINS = (
    "prune(macs=0.7, rounds=2, tune=finetune(steps=3)) | finetune(steps=3)",
    "sparsify(sparsity=0.6, keep_ends=False, train=distill(steps=4), interval=2) | quantize(samples=8)",
    "sparsify(sparsity=0.5, keep_ends=False, samples=0) | prune(macs=0.8, tune=True) | finetune(steps=3)",
)


@pytest.mark.parametrize("recipe", CHAINS)
@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_recipes_that_train_obey_the_laws_on_the_zoo(name: str, recipe: str, tmp_path: Path):
    if "prune" in recipe and name == "tied":
        recipe = recipe.replace("macs=", "what=('neurons', 'width'), macs=")
    network, task = zoo_chain(name)
    before = network.fingerprint()
    *_, last, made = applied(recipe, network, task)
    assert network.fingerprint() == before
    made.check()
    assert set(made.sparse) <= set(dict(made.named_tensors()))
    for key in set(last.sparse) & set(made.sparse):
        old, new = last.tensor(key), made.tensor(key)
        if old.shape == new.shape:
            assert not bool(((old == 0) & (new != 0)).any())
    path = tmp_path / "model.onnx"
    write(loaded_equals_live(made, like(BY_NAME[name].inputs(2), 3, 5)), path)
    simulation_equals_artifact(made, path, like(BY_NAME[name].inputs(2), 3, 5))


# What the parts of a chain do to each other ----------------------------------------------------------------------------------------


def test_rounds_with_training_meet_the_amount_and_beat_rounds_without():
    """A quarter of the MACs by norms, without repair, of a net with batch norms that must still be there to train."""
    network, task = digits_chain(convolutional())
    fields: dict[str, Any] = {"macs": 0.25, "rounds": 3, "importance": "l2", "refit": False}
    bare, tuned = Prune(**fields)(network, task), Prune(**fields, tune=Finetune(epochs=3, rate=5e-3))(network, task)
    for made in (bare, tuned):
        assert macs_of(made) <= 0.25 * macs_of(network)
    norms = [sum(node.target is aten.batch_norm.default for node in made.graph.nodes) for made in (network, bare, tuned)]
    assert norms == [2, 0, 2]
    assert len(tuned.origin["trained"]) == 3
    assert accuracy(tuned) > accuracy(bare) + 0.05, (accuracy(tuned), accuracy(bare))


def test_biases_that_repairs_did_not_need_are_not_left_to_training():
    """A convolution before a batch norm has no bias, and has none after rounds with training, unless a repair gave it one."""
    network, task = digits_chain(convolutional())
    made = Prune(macs=0.6, refit=False, renormalise=False, tune=Training(steps=4))(network, task)
    assert len(give_biases(network.fork())) == len(give_biases(made.fork())) == 2


def test_layers_are_dropped_and_trained():
    network, task = zoo_chain("residual")
    made = Prune(ratio=0.5, what=("layers",), tune=Training(steps=3))(network, task)
    assert macs_of(made) < macs_of(network) and made.origin["trained"]


def test_trained_zeros_survive_quantization_bit_for_bit():
    network, task = digits_chain(mlp())
    recipe = "sparsify(sparsity=0.9, keep_ends=False, train=finetune(epochs=6, rate=3e-3), interval=5) | quantize()"
    _, sparse, quantized = applied(recipe, network, task)
    assert sparse.sparse and quantized.sparse.keys() == sparse.sparse.keys()
    for name in sparse.sparse:
        assert not bool((quantized.tensor(name)[sparse.tensor(name) == 0] != 0).any())
    assert accuracy(quantized) > accuracy(sparse) - 0.03


class Forward(Hook):
    """Looks whether every forward pass of the training had the zeros."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.zeros = names, dict[str, torch.Tensor]()

    def before(self, learner: Learner) -> None:
        for name in self.names:
            zeros = learner.network.tensor(name) == 0
            assert name not in self.zeros or not bool((self.zeros[name] & ~zeros).any())
            self.zeros[name] = zeros


@pytest.mark.parametrize("options", [{"optimizer": "sgd", "rate": 0.05}, {"optimizer": "adamw", "decay": 0.1}, {"average": 0.5}])
def test_no_step_of_a_later_training_revives_a_zero(options: dict[str, Any]):
    network, task = digits_chain(mlp())
    _, sparse = applied("sparsify(sparsity=0.8, keep_ends=False, train=finetune(steps=10), interval=2)", network, task)
    made = Finetune(steps=12, **options).train(sparse, task, hooks=[Forward(list(sparse.sparse))])
    made.check()
    assert all(int(torch.count_nonzero(made.tensor(name))) <= count for name, count in sparse.sparse.items())


def test_run_builds_a_recipe_that_trains_and_prunes_in_rounds(tmp_path: Path):
    """One recipe text through the engine to a measured file; run again it is found, not trained again."""
    _, task = digits_chain(convolutional())
    recipe = "prune(macs=0.5, rounds=2, tune=finetune(epochs=2)) | finetune(epochs=2) | sparsify(sparsity=0.5, train=finetune(epochs=2), interval=5)"
    target = ds.Target(runtime="onnxruntime")
    first = ds.run(task, recipe, target, into=tmp_path)
    again = ds.run(task, recipe, target, into=tmp_path)
    assert first.artifact.sha256 == again.artifact.sha256
