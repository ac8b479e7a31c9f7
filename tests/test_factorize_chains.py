"""factorize() before and behind the other techniques."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factor_nets import IDS, cost, mixer, residual
from small_nets import like

import downsize as ds
from downsize.network.judge import Judge
from downsize.recipe import Recipe
from downsize.task import Task
from downsize.techniques.distill import Distill
from downsize.techniques.factorize import Factorize
from downsize.techniques.prune import Prune
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import check_technique, loaded_equals_live, simulation_equals_artifact


def test_pruning_cuts_the_rank():
    network, task = mixer()
    made = Factorize(macs=0.7, what=("linear",))(network, task)
    again = check_technique(Prune(macs=0.6, multiple=1), made, task)
    assert cost(again, task).macs <= 0.6 * cost(made, task).macs
    ranks = [{name: tensor.shape[0] for name, tensor in one.named_tensors() if ".first." in name} for one in (made, again)]
    assert any(ranks[1][name] < rank for name, rank in ranks[0].items())


def test_a_pruned_network_is_factored():
    network, task = residual()
    pruned = Prune(macs=0.7)(network, task)
    made = check_technique(Factorize(macs=0.7), pruned, task)
    assert cost(made, task).macs <= 0.7 * cost(pruned, task).macs


@pytest.mark.parametrize("which", ["mixer", "residual"])
def test_factors_are_quantized_and_the_file_computes_what_they_do(which: str, tmp_path: Path):
    network, task = {"mixer": mixer, "residual": residual}[which]()
    made = Factorize(macs=0.6)(network, task)
    quantized = Quantize()(made, task)
    weights = {str(node.args[0].target) for node in quantized.graph.nodes if node.target is torch.ops.downsize.fake_quantize.default}
    assert any(".first." in name for name in weights) and any(".second." in name for name in weights)
    ds.runtimes.RUNTIMES["onnxruntime"].export(quantized, tmp_path / "made.onnx")
    example = like(task.example, 3, 7)
    assert simulation_equals_artifact(quantized, tmp_path / "made.onnx", example).requantizations > 0


def test_factors_are_trained_and_made_sparse():
    network, task = mixer()
    batches = [(like(IDS, 8, seed), None) for seed in range(8)]
    task = Task(task.model, task.example, {**task.data, "train": lambda: batches})
    made = Factorize(macs=0.4, refit=False, fold=False)(network, task)
    judge = Judge(network, [[like(IDS, 64, 100)]])
    trained = Distill(epochs=6, rate=3e-3)(made, task)
    assert judge(trained) < judge(made)
    sparse = Sparsify(sparsity=0.5)(made, task)
    assert any(".first." in name for name in sparse.sparse)


def test_it_is_spelled_saved_and_factored_again(tmp_path: Path):
    network, task = mixer()
    (step,) = Recipe.parse("factorize(macs=0.7, multiple=4, forms=('tucker', 'cp'))").steps
    assert step == Factorize(macs=0.7, multiple=4, forms=("tucker", "cp"))
    assert Recipe.parse(str(Recipe((step,)))).steps == (step,)
    made = step(network, task)
    loaded = loaded_equals_live(made, task.example, tmp_path)
    again = Factorize(ratio=0.7, multiple=1)(loaded, task)
    assert cost(again, task).macs <= 0.8 * cost(made, task).macs
    assert any(".first.second" in name or ".second.first" in name for name, _ in again.named_tensors())
