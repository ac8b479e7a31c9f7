"""Which layers suffer: losses against whole networks that were changed in one place, and reasons that were put there."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportUnhashable=false
# (torch types every part of a module as a union of everything)

from __future__ import annotations

import pytest
import torch
from small_nets import Net, conv, plain, task_of
from torch import Tensor, nn
from typer.testing import CliRunner

from downsize import cli
from downsize.network.judge import Judge
from downsize.network.network import Network
from downsize.network.rewrite import insert_after
from downsize.network.statistics import Pieces, distributions, walk
from downsize.numerics.grids import activation_grid
from downsize.quantization import sensitivities
from downsize.quantization.diagnosis import diagnose
from downsize.quantization.formats import Format
from downsize.quantization.placement import place
from downsize.quantization.ranges import fake
from downsize.quantization.sensitivities import changed, fisher, input_losses, losses, nearest_changes, output_errors
from downsize.quantization.weight_only import Data

IMAGE = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.d((lambda y: torch.relu(net.c(torch.relu(net.b(y))) + y))(torch.relu(net.a(x))).mean((2, 3))),
        a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 8, 1), d=nn.Linear(8, 5),
    )  # fmt: skip


def pieces_of(network: Network, model: nn.Module, example: Tensor = IMAGE, batches: int = 3) -> Pieces:
    return Pieces.of(network, task_of(model, example, batches).batches("calibrate"))


def test_losses_are_those_of_whole_networks() -> None:
    # Oracle: one weight changed, the whole network run. Bit-equal, as of the frontier.
    model = residual()
    network = plain(model, IMAGE)
    pieces, points = pieces_of(network, model), place(network).weights
    changes = nearest_changes(network, points, {str(point.node.target): {4: Format(4), 2: Format(2)} for point in points})
    found, judge = losses(network, pieces, changes), Judge(network, pieces)
    assert found.keys() == changes.keys() and len(found) == 4
    for name, ways in changes.items():
        for bits, change in ways.items():
            other = network.fork()
            with changed(other, change):
                assert found[name][bits] == judge(other) > 0
    assert all(found[name][2] > found[name][4] for name in found)


def test_the_error_of_a_layer_is_that_of_its_own_output() -> None:
    # Oracle: torch's own layer on the inputs that it has in the model.
    model = residual()
    network = plain(model, IMAGE)
    pieces = pieces_of(network, model)
    change = nearest_changes(network, place(network).weights[1:2], {"b.weight": {3: Format(3)}})
    found = output_errors(network, pieces, change)["b.weight"][3]
    error = norm = 0.0
    for (x,) in pieces:
        with torch.no_grad():
            y = torch.relu(model.a(x))
            exact = torch.nn.functional.conv2d(y, model.b.weight, model.b.bias, padding=1, groups=8)
            got = torch.nn.functional.conv2d(y, change["b.weight"][3]["b.weight"], model.b.bias, padding=1, groups=8)
        error, norm = error + float((got - exact).square().sum()), norm + float(exact.square().sum())
    assert found == pytest.approx(error / norm, rel=1e-4)


def test_a_weight_that_two_layers_read_counts_both() -> None:
    model = Net(lambda net, x: net.w(torch.tanh(net.w(x))), w=nn.Linear(6, 6))
    example = torch.randn(4, 6)
    network = plain(model, example)
    pieces = pieces_of(network, model, example)
    changes = nearest_changes(network, place(network).weights, {"w.weight": {3: Format(3)}})
    other, judge = network.fork(), Judge(network, pieces)
    with changed(other, changes["w.weight"][3]):
        assert losses(network, pieces, changes)["w.weight"][3] == judge(other)
    error = norm = 0.0
    new = changes["w.weight"][3]["w.weight"]
    for (x,) in pieces:
        with torch.no_grad():
            for each in (x, torch.tanh(model.w(x))):
                error += float(((each @ new.T) - (each @ model.w.weight.T)).square().sum())
                norm += float(model.w(each).square().sum())
    assert output_errors(network, pieces, changes)["w.weight"][3] == pytest.approx(error / norm, rel=1e-4)


def test_losses_of_inputs_are_those_of_whole_networks() -> None:
    # Oracle: a quantizer put into the graph for that layer alone, the whole network run.
    model = residual()
    network = plain(model, IMAGE)
    pieces, layers = pieces_of(network, model), place(network).layers
    measured = distributions(network, pieces, {layer.args[0] for layer in layers})
    for clipped in (False, True):
        found = input_losses(network, layers, pieces, measured, (8, 3), clipped)
        for layer in layers:
            for bits in (8, 3):
                grid = activation_grid(bits)
                known = measured[layer.args[0]]
                bounds = sensitivities.mean_squared_error(known, grid) if clipped else (known.low, known.high)
                other = network.fork()
                twin = next(node for node in other.graph.nodes if node.name == layer.name)
                insert_after(other, twin.args[0], lambda x, bounds=bounds, grid=grid: fake(x, bounds, grid), (), [twin])
                outputs = [walk(other, leaves, {}) for leaves in pieces]
                assert found[layer.name][bits] == pytest.approx(Judge(network, pieces).compare(outputs), rel=1e-5)


def test_the_derivatives_predict_losses_of_a_linear_net(monkeypatch: pytest.MonkeyPatch) -> None:
    # Oracle: for y = W x the expected loss of independent changes of single weights is sum_ij E[x_j^2] d_ij^2 / E|y|^2, exactly.
    monkeypatch.setattr(sensitivities, "DIRECTIONS", 400)
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False)
    example = torch.randn(4, 5)
    network = plain(model, example)
    pieces = pieces_of(network, model, example, 6)
    change = {"weight": {0: {"weight": model.weight.detach() + 0.01 * torch.randn(4, 5)}}}
    difference = (change["weight"][0]["weight"] - model.weight.detach()).double()
    x = torch.cat([piece[0] for piece in pieces]).double()
    expected = float((difference.square() @ x.square().sum(0)).sum() / (x @ model.weight.detach().double().T).square().sum())
    assert fisher(network, pieces, change)["weight"][0] == pytest.approx(expected, rel=0.05)


def diagnosed(model: nn.Module, example: Tensor) -> dict[str, tuple[str, ...]]:
    network = plain(model, example)
    pieces = pieces_of(network, model, example, 6)
    return {one.weight: one.reasons for one in diagnose(network, Data(pieces[::2], pieces[1::2]))}


def test_reasons_name_what_was_put_there() -> None:
    torch.manual_seed(0)
    outlier = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    weight = outlier[0].weight.detach()
    weight[:, 3], weight[:, 7] = 2.0, -2.0
    (reason,) = diagnosed(outlier, torch.randn(4, 128))["0.weight"][:1]
    far = float((weight.abs().amax(1) / weight.square().mean(1).sqrt()).median())
    assert f"the largest weight of a row is {far:.0f} times" in reason and "group=32 leaves the layer" in reason, reason
    depthwise = Net(lambda net, x: net.b(torch.relu(net.a(x))), a=conv(3, 8), b=conv(8, 8, groups=8, bias=False))
    torch.nn.init.normal_(depthwise.b.weight)
    (reason,) = diagnosed(depthwise, IMAGE)["b.weight"][:1]
    assert "a row has only 9 weights" in reason


class Spread(nn.Module):
    """A linear layer whose inputs have channels of very different range, or rare large values."""

    def __init__(self, rare: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 8)
        with torch.no_grad():
            self.layer.weight[:, 0] *= 0.0 if rare else 1e-3
        self.register_buffer("gain", torch.ones(32))
        self.gain[0] = 1e4 if rare else 400.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.gain)


def test_reasons_of_inputs() -> None:
    model = Spread(rare=False)
    reasons = diagnosed(model, torch.randn(4, 32))["layer.weight"]
    assert any("the range of its widest channel is" in reason and "smooth=True" in reason for reason in reasons)
    network = plain(model, torch.randn(4, 32))
    pieces = pieces_of(network, model, torch.randn(4, 32), 6)[1::2]
    peak = torch.cat([piece[0] * model.gain for piece in pieces]).abs().amax(0)
    assert any(f"{float(peak.max() / peak.median()):.0f} times the median's" in reason for reason in reasons)


def test_nothing_large_has_no_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.where(torch.rand(4, 256) < 0.5, -1.0, 1.0))  # every grid has them
    assert diagnosed(model, torch.randn(4, 256)) == {"0.weight": ()}


def test_the_command_shows_every_weight() -> None:
    from pathlib import Path

    task = str(Path(__file__).parent / "digits_task.py")
    result = CliRunner().invoke(cli.app, ["inspect", task, "--sensitivity"])
    assert result.exit_code == 0, result.output
    assert all(f"{name}.weight" in result.output for name in (1, 3, 5)) and "input 4b" in result.output
    refused = CliRunner().invoke(cli.app, ["inspect", "model.onnx", "--sensitivity"])
    assert refused.exit_code == 2 and "brings no data" in refused.output
