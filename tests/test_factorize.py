"""factorize() as a whole: what it leaves, what it loses, and what it refuses."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factor_nets import IDS, IMAGE, Mixer, cost, mixer, residual
from small_nets import Net, conv, like, task_of, weight
from torch import nn
from zoo import BY_NAME, specimen

import downsize as ds
from downsize.errors import AllocationError, CutError, SpecError, TaskError
from downsize.factoring.anchoring import anchored
from downsize.factoring.costs import Costs
from downsize.factoring.forms import Decomposed, Known
from downsize.factoring.ladder import with_known
from downsize.factoring.layers import joined, layers_of
from downsize.factoring.options import Option, cost_of, error_of
from downsize.factoring.rewriting import Product, put
from downsize.network.capture import capture
from downsize.network.judge import Judge
from downsize.network.network import Network
from downsize.pruning.latency import predicted
from downsize.pruning.pieces import collected
from downsize.task import Task
from downsize.techniques.factorize import Factorize
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import check_technique, neutral_equals_identity

# What remains -----------------------------------------------------------------------------------------------------------------------


def test_a_factored_network_obeys_the_laws():
    network, task = residual()
    made = check_technique(Factorize(macs=0.5), network, task)
    assert 0.4 * cost(network, task).macs < cost(made, task).macs <= 0.5 * cost(network, task).macs
    told = made.origin["factorized"]
    assert told["by"] == "ladder" and "macs" in told["one.0.weight"] and "error" in told["one.0.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shuffle", "vit", "text", "gpt2", "llama", "segformer"])
def test_so_does_every_architecture(name: str):
    example = BY_NAME[name].inputs(2)
    model, network = specimen(name)
    task = Task(model, example, {"calibrate": lambda: [(BY_NAME[name].inputs(size), None) for size in (8, 9, 10)]})
    made = check_technique(Factorize(ratio=0.5, multiple=1), network, task)
    assert sum(tensor.numel() for tensor in made.parameters()) < sum(tensor.numel() for tensor in network.parameters())


@pytest.mark.parametrize("fields", [{"parameters": 0.6}, {"size": 0.6}, {"macs": 0.6, "joint": False}, {"parameters": 0.6, "what": ("embedding",)}])
def test_what_remains_is_at_most_what_was_asked_for(fields: dict[str, Any]):
    network, task = mixer()
    if fields.get("what") == ("embedding",):
        fields = {**fields, "parameters": 0.95}
    made = check_technique(Factorize(**fields), network, task)
    measured = [{"parameters": one.parameters, "size": one.bytes, "macs": one.macs} for one in (cost(network, task), cost(made, task))]
    ((name, share),) = [(key, value) for key, value in fields.items() if key in measured[0]]
    assert measured[1][name] <= share * measured[0][name]
    assert measured[1][name] < measured[0][name]


def test_absolute_amounts_are_those_numbers():
    network, task = mixer()
    whole = cost(network, task).bytes
    assert cost(Factorize(size=0.7 * whole)(network, task), task).bytes <= 0.7 * whole


def test_a_ratio_is_of_every_layer():
    network, task = mixer()
    made = Factorize(ratio=0.5, joint=False, multiple=1)(network, task)
    for node in ("q", "k", "v", "up", "down", "out", "table"):
        before = network.tensor(f"{node}.weight").numel()
        parts = [tensor.numel() for name, tensor in made.named_tensors() if name in (f"{node}.first.weight", f"{node}.second.weight")]
        assert len(parts) == 2 and 0.25 * before < sum(parts) <= 0.5 * before


@pytest.mark.parametrize("fields", [{"ratio": 1.0}, {"macs": 1.0}, {"parameters": 1.0}, {"ranks": "energy", "energy": 1.0}])
def test_nothing_to_remove_is_the_identity(fields: dict[str, Any]):
    network, task = residual()
    neutral_equals_identity(network, Factorize(**fields)(network, task), like(IMAGE, 3, 1), tolerance=1e-5)


def test_energy_is_what_each_layer_keeps():
    """Oracle: the layers' outputs on the calibration data, without refit."""
    network, task = mixer()
    made = Factorize(ranks="energy", energy=0.9, refit=False, what=("linear",), joint=False, multiple=1)(network, task)
    told = {name: note for name, note in made.origin["factorized"].items() if name != "by"}
    assert len(told) == 6 and all(float(note.split("error ")[1].split(",")[0]) <= 0.1 for note in told.values())
    closer = Factorize(ranks="energy", energy=0.99, refit=False, what=("linear",), joint=False, multiple=1)(network, task)
    x = like(IDS, 64, 5)
    judge = Judge(network, [[x]])
    assert judge(closer) < judge(made) < 0.5 and cost(closer, task).macs > cost(made, task).macs


def test_evidence_finds_planted_ranks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), conv_of_rank(5)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(60, 4) @ torch.randn(4, 40) + 0.05 * torch.randn(60, 40))
    example = torch.zeros(2, 40)
    made = Factorize(ranks="evbmf")(capture(model, example), task_of(model, example))
    assert made.tensor("0.first.weight").shape == (4, 40)
    assert made.tensor("2.conv.first.weight").shape[0] == made.tensor("2.conv.second.weight").shape[1]


def conv_of_rank(rank: int) -> nn.Module:
    model = Net(lambda net, x: net.conv(x.reshape(-1, 12, 5, 1)), conv=nn.Conv2d(12, 20, 3, padding=1))
    with torch.no_grad():
        noise = 0.02 * torch.randn(20, 12, 3, 3)
        model.conv.weight.copy_(torch.einsum("or,rikl->oikl", torch.randn(20, rank), torch.randn(rank, 12, 3, 3)) + noise)
    return model


def test_ranks_are_multiples():
    network, task = mixer()
    made = Factorize(macs=0.6, multiple=4)(network, task)
    ranks = [tensor.shape[0] for name, tensor in made.named_tensors() if "first" in name]
    assert ranks and all(rank % 4 == 0 for rank in ranks)


def test_layers_are_shared_where_that_is_better():
    network, task = mixer()
    model = Mixer()
    with torch.no_grad():
        # What they read of their input is nearly the same.
        common = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)) / 6
        for layer in (model.q, model.k, model.v):
            layer.weight.copy_(layer.weight[:, :10] * 3 @ common + 0.02 * layer.weight)
    network, task = capture(model.eval(), IDS), task_of(model, IDS, batches=12)
    made, alone = (Factorize(macs=0.6, multiple=1, what=("linear",), joint=joint)(network, task) for joint in (True, False))
    assert "together with 2 more" in made.origin["factorized"]["q.weight"] and "together" not in str(alone.origin["factorized"])
    assert float(made.origin["error"]) < float(alone.origin["error"])
    (first,) = [node for node in made.graph.nodes if node.op == "get_attr" and node.target == "q.first.weight"]
    (call,) = first.users
    assert len(call.users) == 3


def test_the_ladder_tells_costs_and_errors():
    network, task = mixer()
    sites = Factorize(macs=0.5, what=("linear",)).ladder(network, task)
    assert [len(ways[0]) for ways in sites] == [3, 1, 1, 1]
    for ways in sites:
        costs, errors = [cost_of(way) for way in ways], [error_of(way) for way in ways]
        assert costs == sorted(costs, reverse=True) and errors == sorted(errors) and errors[0] == 0


# What is lost -----------------------------------------------------------------------------------------------------------------------


def test_data_and_refit_lower_the_error():
    network, task = mixer()
    judge = Judge(network, [[like(IDS, 64, seed)] for seed in range(100, 104)])
    # Without the table, whose rows occur alike often.
    common: dict[str, Any] = {"macs": 0.5, "what": ("linear",), "multiple": 2}
    errors = [judge(Factorize(**common, **more)(network, task)) for more in ({}, {"refit": False}, {"samples": 0})]
    assert errors[0] < errors[1] < errors[2]


def test_layers_fitted_in_order_give_what_the_original_gives():
    """Oracle: the layers' outputs in both networks, on data that nothing was fitted on."""
    network, task = mixer()
    data = collected(network, task, 48, 5)
    sites = [site for site in joined(network, layers_of(network, ("linear",))[0]) if site[0].name != "out.weight"]
    own = {}
    for site, known in with_known(network, sites, 0.01, data):
        option = Option(site, "matrix", (6,), 0.0, 0.0)
        own[option] = Decomposed(site, [layer.dense.weight for layer in site], known, ()).products("matrix", (6,))[0]
    before = network.fork()
    put(before, [product for products in own.values() for product in products])
    made, told = anchored(network, own, data, 0.01)
    assert [node.name for node in made.graph.nodes if node.op == "call_function"] == [
        node.name for node in before.graph.nodes if node.op == "call_function"
    ]
    assert len(told) == 3 and all(one.after <= one.before for one in told.values()) and any(one.after < 0.99 * one.before for one in told.values())
    judge = Judge(network, [[like(IDS, 64, seed)] for seed in range(100, 104)])
    assert judge(made) < judge(before)


def test_rows_of_a_table_count_as_they_are_looked_up():
    """Oracle: the squared error of the table, weighted by how often each row is looked up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 4)).eval()
    counts = (1000 / torch.arange(1, 51) ** 1.5).round().long() + 1
    ids = torch.repeat_interleave(torch.arange(50), counts)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    ids = ids[: len(ids) // 8 * 8].reshape(-1, 8)
    task = Task(model, ids[:2], {"calibrate": lambda: [(ids, None)]})
    network = capture(model, ids[:2])
    errors = {}
    for samples in (512, 0):
        made = Factorize(parameters=0.7, what=("embedding",), samples=samples, multiple=1)(network, task)
        table = made.tensor("0.first.weight") @ made.tensor("0.second.weight").T + made.tensor("0.second.bias")
        errors[samples] = float(((table - network.tensor("0.weight")).detach().square().sum(1) * counts).sum())
    assert errors[512] < 0.9 * errors[0]


# Latency ----------------------------------------------------------------------------------------------------------------------------


class Staircase:
    """A clock by which convolutions with kernels take long, and those of few channels no less than others."""

    def milliseconds(self, shapes: Sequence[Any]) -> list[float]:
        return [float(np.ceil(shape.operands[1].shape[0] / 16) * np.prod(shape.operands[1].shape[1:])) + 20.0 for shape in shapes]


def test_latency_goes_by_the_clock():
    network, task = residual()
    task = Task(task.model, task.example, task.data, clock=Staircase())
    made = Factorize(latency=0.8)(network, task)
    plain = Factorize(ratio=1.0)(network, task)
    whole, left = (predicted(Staircase(), one, IMAGE[:1]) for one in (plain, made))
    assert left <= 0.8 * whole
    assert any("latency" in str(note) for note in made.origin["factorized"].values())


@pytest.mark.slow
def test_latency_is_met_by_layers_measured_in_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Oracle: the same table of measurements, read again, over the layers of the network that was built."""
    from downsize.measure.shapes import LatencyTable

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    image = torch.zeros(1, 3, 32, 32)
    result = ds.run(task_of(model, image, batches=12), "factorize(latency=0.7, forms=('spatial',))", ds.Target(), into=tmp_path / "run")
    assert result.artifact is not None and Path(result.artifact.path).stat().st_size > 0
    networks = [Network.load(path) for path in (tmp_path / "run" / "steps").glob("*/network.safetensors")]
    (original,) = [network for network in networks if "factorized" not in network.origin]
    (made,) = [network for network in networks if "factorized" in network.origin]
    whole, left = (predicted(LatencyTable(), network, image) for network in (original, made))
    assert left <= 0.7 * whole


def test_factors_that_do_not_pay_are_not_taken_and_told_with_the_measurement():
    """By this clock every layer takes as long as any other, so that two take twice as long."""

    class Flat:
        def milliseconds(self, shapes: Sequence[Any]) -> list[float]:
            return [1.0] * len(shapes)

    network, task = residual()
    task = Task(task.model, task.example, task.data, clock=Flat())
    made = Factorize(latency=1.0)(network, task)
    assert made.origin["factorized"]["one.0.weight"] == "dense: latency 2 with factors, 1 without"
    neutral_equals_identity(network, made, like(IMAGE, 3, 1), tolerance=1e-5)
    with pytest.raises(AllocationError, match="smallest value it can reach is 4"):
        Factorize(latency=0.9)(network, task)


def test_what_counts_as_lighter():
    """Whatever the measure says: of 32 x 32 weights two factors are lighter below half the width."""
    network, task = mixer()
    layer = next(layer for layer in layers_of(network, ("linear",))[0] if layer.name == "q.weight")
    costs = Costs(network, Task(task.model, task.example, task.data, clock=Staircase()), "latency")
    dense = [Product(layer, (layer.dense,), torch.zeros(0))]
    made = Decomposed((layer,), (layer.dense.weight,), Known(), ())
    lighter = [rank for rank in range(1, 33) if costs.lighter(made.products("matrix", (rank,))[0], dense)]
    assert lighter == list(range(1, 16))


# What it refuses --------------------------------------------------------------------------------------------------------------------


def test_amounts_and_ranks_must_fit():
    for fields, words in (({}, "no amount"), ({"macs": 0.5, "size": 0.5}, "macs, size"), ({"macs": 0.5, "ranks": "energy"}, "give no amount")):
        with pytest.raises(SpecError, match=words):
            Factorize(**fields)
    with pytest.raises(SpecError, match="at least one"):
        Factorize(macs=0.5, what=())


def test_what_no_factors_can_lower_is_said_with_its_reason():
    """Of two samples: 2 filters of 9 weights, computed, at 64 places, and a linear layer of 128 x 64."""
    torch.manual_seed(0)
    parts = {"kernel": weight(2, 1, 3, 3), "last": nn.Linear(128, 64)}
    model = Net(lambda net, x: net.last(nn.functional.conv2d(x, net.kernel * x.mean()).flatten(1)), **parts).eval()
    example = torch.randn(2, 1, 10, 10)
    network = capture(model, example)
    layer, whole = 2 * 2 * 9 * 64, 2 * 2 * 9 * 64 + 2 * 128 * 64
    says = rf"smallest value.*Of all {whole}, {layer} are where no factors can stand \(conv2d: its weight is computed\)"
    with pytest.raises(AllocationError, match=says):
        Factorize(macs=0.1)(network, task_of(model, example))


def test_what_cannot_be_done_is_said():
    network, task = residual()
    with pytest.raises(CutError, match="factorize first, then quantize"):
        Factorize(macs=0.5)(Quantize()(network, task), task)
    with pytest.raises(AllocationError, match="smallest value it can reach"):
        Factorize(macs=0.001)(network, task)
    with pytest.raises(TaskError, match="clock"):
        Factorize(latency=0.5)(network, task)
    sparse = Sparsify(sparsity=0.5, keep_ends=False)(network, task)
    with pytest.raises(TaskError, match="the zeros of its weight must stay: factorize first"):
        Factorize(macs=0.5)(sparse, task)
    _, lstm = specimen("lstm")
    with pytest.raises(TaskError, match="no layers of the kinds conv"):
        Factorize(macs=0.9, what=("conv",))(lstm, task)
    with pytest.raises(AllocationError, match=r"where no factors can stand \(lstm: aten.lstm.input has no factored form here\)"):
        Factorize(macs=0.1)(lstm, task_of(specimen("lstm")[0], BY_NAME["lstm"].inputs(2)))


def test_the_projections_of_attention_over_another_sequence_are_layers():
    """torch keeps the weights of queries, keys and values in one tensor, of which the graph takes parts."""
    torch.manual_seed(0)
    parts = {"attention": nn.MultiheadAttention(16, 2, batch_first=True), "last": nn.Linear(16, 4)}
    model = Net(lambda net, x: net.last(net.attention(x[:, :3], x, x, need_weights=False)[0]), **parts).eval()
    example = torch.zeros(2, 9, 16)
    network = capture(model, example)
    made = check_technique(Factorize(ratio=0.5, multiple=1), network, task_of(model, example))
    told = made.origin["factorized"]
    assert {name for name, note in told.items() if note.startswith("matrix")} >= {"attention.in_proj_weight_0", "attention.in_proj_weight_1"}
    assert not any(str(note).startswith("left") for note in told.values())
    sparse = Sparsify(sparsity=0.5, keep_ends=False)(network, task_of(model, example))
    assert {"attention.in_proj_weight_0", "attention.in_proj_weight_1"} <= sparse.sparse.keys()
