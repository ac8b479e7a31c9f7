"""Weights quantized alone: formats, rounding in order, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from downsize.errors import SpecError, TaskError
from downsize.network.capture import capture
from downsize.network.judge import Judge
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import aten, drop_identities
from downsize.network.statistics import Pieces
from downsize.numerics.refit import Moments, residual
from downsize.quantization.formats import Format
from downsize.quantization.grouped import GROUPED, LEVELS, nearest, quantize, solved, steps_of
from downsize.quantization.in_order import round_in_order
from downsize.quantization.placement import place
from downsize.quantization.weight_only import Data, quantize_weight_only
from downsize.runtimes import open_artifact
from downsize.task import Task
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import loaded_equals_live


class Tokens(nn.Module):
    """A table, a residual block with a layer norm, and a head, on correlated tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 6)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def tokens() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Tokens().eval(), torch.randint(40, (48, 12), generator=torch.Generator().manual_seed(1))


def task_of(model: nn.Module, data: Tensor) -> Task:
    return Task(model, data[:2], {"calibrate": lambda: [(data[i : i + 4], None) for i in range(0, len(data), 4)]})


def file_is_simulation(network: Network, inputs: Tensor, path: Path) -> None:
    write(network, path)
    expected = network(inputs).detach()
    assert float((torch.as_tensor(open_artifact(path, "onnxruntime", 1)(inputs)) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def pieces_of(network: Network, data: Tensor) -> tuple[Pieces, Pieces]:
    return Pieces.of(network, ((data[i : i + 4], None) for i in range(0, len(data), 4)), len(data)).parted(4)


FORMATS = [Format(4), Format(4, 16), Format(3, 16, symmetric=False), Format(2, 32, symmetric=False), Format(4, 16, levels="nf4"), Format(8, 16)]


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
def test_the_quantizer_in_the_graph_gives_what_was_rounded(wanted: Format, tokens):
    # Oracle: the values themselves; they are on their grid, so that rounding again changes nothing.
    model, data = tokens
    network = capture(model, data[:2])
    point = next(p for p in place(network).weights if str(p.node.target) == "up.weight")
    weight = network.tensor("up.weight").detach()
    steps = steps_of(weight, wanted)
    rounded = nearest(weight, wanted, steps)
    assert len(rounded.unique()) <= 2**wanted.bits * steps.scale.numel()
    network.tensor("up.weight").data.copy_(rounded)
    quantize(network, point, wanted, steps)
    network.recompile()
    node = next(n for n in network.graph.nodes if n.target in (GROUPED, LEVELS) or "fake_quantize" in str(n.target))
    found = node.target(*(network.tensor(str(a.target)) if hasattr(a, "target") else a for a in node.args))
    assert torch.allclose(found, rounded, rtol=1e-6, atol=0)


def test_bytes_of_a_format_are_counted_by_hand():
    assert Format(4).bytes(10, 64) == 10 * (64 * 4 + 16) / 8
    assert Format(4, 32, symmetric=False).bytes(10, 65) == (10 * 65 * 4 + 10 * 3 * (16 + 4)) / 8


def test_gptq_in_a_format_errs_less_on_its_inputs_than_nearest():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator)
    x = torch.randn(400, 48, generator=generator) @ mixing
    weight = torch.randn(20, 48, generator=generator)
    gram = (x.T @ x).double()[None]
    for wanted in FORMATS[:5]:
        steps = steps_of(weight, wanted)
        errors = [float(((w - weight) @ x.T).square().sum()) for w in (nearest(weight, wanted, steps), solved(weight[None], gram, wanted, steps)[0])]
        assert errors[1] < 0.8 * errors[0], wanted


def test_layers_in_order_err_less_than_nearest_and_gptq_without_order(tokens):
    # Oracle: the outputs of the whole network on data that nothing was fitted on.
    model, data = tokens
    network = capture(model, data[:2])
    fit, held = pieces_of(network, data)
    formats = {name: Format(3) for name in ("up.weight", "down.weight", "head.weight")}
    other = torch.randint(40, (64, 12), generator=torch.Generator().manual_seed(7))
    judge = Judge(network, list(pieces_of(network, other)[0]))
    placement = place(network)
    losses = {
        "nearest": judge(quantize_weight_only(network, placement, formats, "nearest", None)),
        "gptq": judge(quantize_weight_only(network, placement, formats, "gptq", Data(fit, held), refit=False)),
        "refit": judge(quantize_weight_only(network, placement, formats, "gptq", Data(fit, held), refit=True)),
    }
    assert losses["gptq"] < 0.7 * losses["nearest"]
    assert losses["refit"] <= 1.05 * losses["gptq"]


def test_what_is_told_of_a_layer_is_its_error_on_held_back_data(tokens):
    # Oracle: the first layer's inputs and outputs, from the module itself.
    model, data = tokens
    network = capture(model, data[:2])
    fit, held = pieces_of(network, data)
    made = network.fork()
    found = round_in_order(network, made, {"up.weight": Format(3)}, fit, held, refit=True)["up.weight"]
    with torch.no_grad():
        x = torch.cat([model.norm(model.table(piece[0])) for piece in held]).reshape(1, -1, 32).mT
        y = torch.cat([model.up(model.norm(model.table(piece[0]))) for piece in held]).reshape(1, -1, 64).mT
    moments = Moments.zero(1, 64, 32)
    moments.add(x, y)
    expected = residual(moments, made.tensor("up.weight").detach()[None], made.tensor("up.bias").detach()[None])
    assert found.error == pytest.approx(expected, rel=1e-3)
    assert found.error < found.nearest


WAYS = {
    "rows": {"bits": 4},
    "groups": {"bits": 4, "group": 16, "tables": 4},
    "zero points": {"bits": 3, "group": 16, "symmetric": False, "tables": 5},
    "hqq": {"bits": 4, "group": 16, "symmetric": False, "rounding": "hqq"},
    "nf4": {"levels": "nf4", "group": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_file_computes_what_was_simulated(way: str, tokens, tmp_path):
    # Oracle: ONNX Runtime; weights are constants for it, so that only sums differ.
    model, data = tokens
    task = task_of(model, data)
    made = Quantize(**WAYS[way], activations="none")(capture(model, data[:2]), task)
    file_is_simulation(made, data[:4], tmp_path / "model.onnx")
    loaded_equals_live(made, data[:4])


def test_zeros_of_a_sparse_weight_stay_through_every_format(tokens):
    model, data = tokens
    task = task_of(model, data)
    sparse = Sparsify(sparsity=0.5, keep_ends=False)(capture(model, data[:2]), task)
    zeros = sparse.tensor("up.weight") == 0
    assert zeros.float().mean() > 0.3
    for fields in WAYS.values():
        made = Quantize(**fields, activations="none")(sparse, task)
        assert bool((made.tensor("up.weight")[zeros] == 0).all()), fields


def test_neutral_is_identity(tokens):
    model, data = tokens
    network = capture(model, data[:2])
    made = Quantize(bits=32, activations="none")(network, task_of(model, data))
    assert torch.equal(made(data[:4]), network(data[:4]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": 32}, "group is for weights alone"),
        ({"symmetric": False, "activations": "dynamic"}, "symmetric=False is for weights alone"),
        ({"rounding": "hqq", "activations": "none"}, "hqq.*places zero points"),
        ({"levels": "nf4", "activations": "none", "bits": 4}, "says already how many"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        Quantize(**fields)


def test_a_network_without_weights_is_refused():
    model, data = nn.Sequential(nn.ReLU()).eval(), torch.randn(8, 3)
    with pytest.raises(TaskError, match="nothing to quantize"):
        Quantize(bits=4, activations="none")(capture(model, data), task_of(model, data))


def test_a_product_with_outputs_along_the_second_axis_gets_one_scale_an_output(tmp_path):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8))

        def forward(self, x):
            return torch.relu(x) @ self.weight

    torch.manual_seed(0)
    model, data = Product().eval(), torch.randn(32, 5, 16)
    network = capture(model, data[:2])
    drop_identities(network)
    made = Quantize(bits=4, ends=4, group=16, activations="none")(network, task_of(model, data))
    assert any(node.target is torch.ops.downsize.fake_quantize.default and node.args[3] == 1 for node in made.graph.nodes)
    assert any(node.target is aten.matmul.default for node in made.graph.nodes)
    file_is_simulation(made, data[:4], tmp_path / "model.onnx")


@pytest.mark.parametrize("fields", [{"bits": 3, "activations": "none"}, {"bits": 3}])
def test_reconstruction_never_loses_more_on_held_back_data(fields, tokens):
    model, data = tokens
    network, task = capture(model, data[:2]), task_of(model, data)
    drop_identities(network)
    plain, better = (Quantize(**fields, ends=3, reconstruct=steps)(network, task) for steps in (0, 60))
    judge = Judge(network, Quantize(**fields)._split(network, task)[1])  # what it was decided by
    assert judge(better) <= judge(plain)
