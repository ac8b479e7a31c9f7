"""Transposed convolutions and convolutions in three directions, as columns and as factors."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from small_nets import Net, like, task_of
from torch import Tensor, fx, nn
from zoo import assert_close, block, shake

import downsize.runtimes
from downsize.factoring.costs import Costs
from downsize.factoring.forms import Decomposed, Known, composed
from downsize.factoring.layers import layers_of
from downsize.factoring.rewriting import put
from downsize.network.capture import capture
from downsize.network.columns import groups_of, input_rows, output_rows, weight_matrix
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.rewrite import set_constant
from downsize.numerics.lowrank_convolutions import FORMS, macs_of
from downsize.pruning.refitting import refit_layers
from downsize.recipe import Recipe
from downsize.task import Task
from downsize.techniques.factorize import Factorize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import check_technique, simulation_equals_artifact

LAYERS = {
    "transposed, overlapping": (nn.ConvTranspose2d(8, 12, 3, 2, 1, 1), (5, 6)),
    "transposed, apart": (nn.ConvTranspose2d(8, 12, 2, 2, bias=False), (5, 6)),
    "transposed, groups": (nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2), (5, 6)),
    "transposed, uneven": (nn.ConvTranspose2d(8, 12, (3, 2), (2, 3), (1, 0), (0, 1), dilation=(2, 1)), (5, 6)),
    "transposed, cropped by more than the kernel": (nn.ConvTranspose2d(8, 12, 2, 2, 2), (9, 9)),
    "transposed, one direction": (nn.ConvTranspose1d(8, 12, 5, 2, 2), (9,)),
    "transposed, three directions": (nn.ConvTranspose3d(8, 12, 3, 2, 1, 1), (3, 4, 5)),
    "three directions": (nn.Conv3d(8, 12, 3, 2, 1), (7, 6, 5)),
    "three directions, flat kernel": (nn.Conv3d(8, 12, (1, 3, 3), 1, (0, 1, 1), groups=2), (4, 6, 5)),
    "three directions, dilation": (nn.Conv3d(8, 12, 3, 1, 2, dilation=2), (4, 6, 5)),
    "a window of a large one": (nn.ConvTranspose2d(8, 12, 3, 2, 1), (31, 40)),
    "a window of a large one in three directions": (nn.Conv3d(8, 12, 3, 1, 1), (9, 12, 20)),
}


def network_of(name: str) -> tuple[Network, nn.Module, Tensor]:
    layer, sizes = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 8, *sizes)
    return capture(layer.eval(), x), layer, x


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_matrix_times_its_columns(name: str):
    """Oracle: torch's own layer."""
    network, layer, x = network_of(name)
    (node,) = [node for node in network.graph.nodes if node.op == "call_function"]
    (found,), _ = layers_of(network, ("conv",))
    assert torch.equal(found.dense.stored(found.dense.weight), layer.weight)
    assert found.dense.output_size(x.shape[2:]) == tuple(layer(x).shape[2:])
    for visit in (0, 1):
        made = weight_matrix(found.dense.weight, groups_of(node)) @ input_rows(node, (x, layer.weight), groups_of(node), visit)
        made = made + (0 if layer.bias is None else layer.bias.reshape(groups_of(node), -1, 1))
        assert_close(made, output_rows(node, layer(x), groups_of(node), visit), 2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_every_form_is_exact_at_full_rank_and_counted_as_it_computes(name: str):
    """Oracles: the layer, and the count of the network in which the factors stand. At a low rank the factors are their product."""
    network, layer, x = network_of(name)
    (found,), _ = layers_of(network, ("conv",))
    tried = {form: FORMS[form].most_of(found.dense) for form in ("channel", "spatial", "tucker", "separable", "tensor_train")}
    tried["cp"] = (6,)
    assert {"channel", "tucker", "separable"} <= {form for form, most in tried.items() if most}
    assert bool(tried["spatial"]) == ("one direction" not in name)
    for form, most in tried.items():
        for ranks in {most, tuple(max(1, rank // 2) for rank in most)} if most else ():
            (product,), error = Decomposed((found,), (found.dense.weight,), Known(), (form,)).products(form, ranks)
            made = network.fork()
            put(made, [product])
            weight = found.dense.stored(composed(product).float())
            assert_close(made.predict(x), torch.func.functional_call(layer, {"weight": weight}, (x,)), 2e-5)
            assert macs_of(product.factors, x.shape[2:]) * len(x) == count(made, x).macs
            if ranks == most and form != "cp":
                assert error < 1e-8
                assert_close(made.predict(x), layer(x), 1e-4)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(8, 12, 3, 2, 1, 1), nn.Conv3d(8, 12, 3, 1, 1)], ids=["transposed", "three directions"])
def test_a_sample_without_a_batch_is_one(layer: nn.Module):
    x = torch.randn(8, *(5, 6, 7)[: layer.weight.dim() - 2], generator=torch.Generator().manual_seed(0))
    network = capture(layer.eval(), x)
    (node,) = [node for node in network.graph.nodes if node.op == "call_function"]
    (found,), _ = layers_of(network, ("conv",))
    made = weight_matrix(found.dense.weight, 1) @ input_rows(node, (x, layer.weight), 1, 0) + layer.bias.reshape(1, -1, 1)
    assert_close(made, output_rows(node, layer(x), 1, 0), 2e-5)
    (product,), _ = Decomposed((found,), (found.dense.weight,), Known(), ("tucker",)).products("tucker", (8, 12))
    costs = Costs(network, Task(layer, x, {"calibrate": lambda: [(x, None)]}), "macs")
    smaller = network.fork()
    put(smaller, [product])
    assert_close(smaller.predict(x), layer(x), 1e-4)
    assert (costs.dense(found), costs.of([product])) == (count(network, x).macs, count(smaller, x).macs)


def test_a_window_meets_every_position_of_a_kernel():
    """Of a kernel of 32 x 32 whose outputs stand apart by as much, with one image."""
    layer = nn.ConvTranspose2d(4, 3, 32, 32).eval()
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    network = capture(layer, x)
    (node,) = [node for node in network.graph.nodes if node.op == "call_function"]
    assert bool((input_rows(node, (x, layer.weight), 1, 5).square().sum((0, 2)) > 0).all())


class Upwards(nn.Module):
    """A U-Net whose transposed convolution is told the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up, self.last = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.ConvTranspose2d(8, 8, 3, 2, 1),
            nn.Conv2d(11, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.middle(torch.relu(self.down(x))))
        return self.last(torch.cat([torch.relu(self.up(y, output_size=x.shape[-2:])), x], 1))


def test_where_sizes_are_computed_a_layer_stays_and_goes_by_magnitude():
    torch.manual_seed(0)
    model, example = Upwards().eval(), torch.randn(2, 3, 12, 12)
    network = capture(model, example, more=[torch.randn(2, 3, 15, 14)])
    task = task_of(model, example)
    made = Factorize(macs=0.8, multiple=1)(network, task)
    assert made.origin["factorized"]["up.weight"] == "left: its sizes are computed"
    sparse = Sparsify(sparsity=0.5, keep_ends=False, method="surgeon")(network, task)
    told = sparse.origin["sparsified"]
    assert told["up.weight"]["method"] == "magnitude" and told["middle.weight"]["method"].startswith("surgeon")
    other = torch.randn(1, 3, 9, 10)
    assert made.predict(other).shape == sparse.predict(other).shape == (1, 4, 9, 10)


def test_a_layer_of_too_wide_a_kernel_stays():
    """As those that draw a whole image from few positions."""
    model = nn.Sequential(nn.Conv2d(3, 24, 3, 4), nn.ConvTranspose2d(24, 2, 64, 32)).eval()
    network = capture(model, torch.randn(1, 3, 12, 12))
    layers, left = layers_of(network, ("conv",))
    assert [layer.name for layer in layers] == ["0.weight"]
    assert left["1.weight"] == f"it reads {24 * 64 * 64} values at each place; more than 16384 take too long to solve for"


def test_what_is_lost_is_the_error_of_the_output():
    """Oracle: the network with factors, on the data of the Gram matrix."""
    layer = nn.ConvTranspose2d(8, 12, 3, 2, 1, 1).eval()
    x = torch.randn(6, 8, 7, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9).reshape(-1, 1, 1) + 1
    network = capture(layer, x)
    (node,) = [node for node in network.graph.nodes if node.op == "call_function"]
    (found,), _ = layers_of(network, ("conv",))
    rows = input_rows(node, (x, layer.weight), 1, 0)
    rows = torch.cat([rows, rows.new_ones(1, 1, rows.shape[2])], 1).double()
    made = Decomposed((found,), (found.dense.weight,), Known(rows @ rows.mT), tuple(FORMS))
    for form, ranks in (("channel", (4,)), ("spatial", (6,)), ("tucker", (4, 6)), ("separable", (3,))):
        (product,), error = made.products(form, ranks)
        smaller = network.fork()
        put(smaller, [product])
        with torch.no_grad():
            right = layer(x)
        lost = (smaller.predict(x) - right).square().sum() / (right - right.mean((0, 2, 3), keepdim=True)).square().sum()
        assert error == pytest.approx(float(lost), rel=1e-3)


# Whole networks ----------------------------------------------------------------------------------------------------------------------


def upwards(x: Tensor, net: Net) -> Tensor:
    y = net.down(x)
    y = torch.relu(net.up(torch.relu(net.middle(y))))
    return net.last(torch.cat([y, x], 1))


@functools.cache
def autoencoder() -> tuple[Network, Task]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = {"down": block(3, 16, stride=2), "middle": nn.Conv2d(16, 24, 3, padding=1), "up": nn.ConvTranspose2d(24, 16, 4, 2, 1)}
    model = Net(lambda net, x: upwards(x, net), **parts, last=nn.ConvTranspose2d(19, 3, 3, 1, 1))
    shake(model)
    example = torch.zeros(2, 3, 12, 12)
    return capture(model.eval(), example), task_of(model, example, batches=12)


@functools.cache
def video() -> tuple[Network, Task]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [
        nn.Conv3d(2, 16, 3, 1, 1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Conv3d(24, 16, (1, 3, 3)),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5))
    shake(model)
    example = torch.zeros(2, 2, 6, 8, 8)
    return capture(model.eval(), example), task_of(model, example, batches=12)


NETWORKS = {"autoencoder": autoencoder, "video": video}


@pytest.mark.parametrize("which", NETWORKS)
def test_laws_hold_under_a_limit(which: str):
    network, task = NETWORKS[which]()
    made = check_technique(Factorize(macs=0.5), network, task)
    assert count(made, task.example).macs <= 0.5 * count(network, task.example).macs
    factored = [name for name, note in made.origin["factorized"].items() if " x " in note.split(",")[0] or note.startswith(tuple(FORMS))]
    assert {"autoencoder": "up.weight", "video": "3.weight"}[which] in factored
    assert not any(str(note).startswith("left") for note in made.origin["factorized"].values())


@pytest.mark.parametrize("which", NETWORKS)
@pytest.mark.parametrize(
    "recipe", ["factorize(macs=0.6) | quantize()", "prune(macs=0.8) | factorize(macs=0.7)", "factorize(macs=0.6) | prune(macs=0.8)"]
)
def test_in_chains_the_file_computes_what_the_network_does(which: str, recipe: str, tmp_path: Path):
    network, task = NETWORKS[which]()
    made = applied(recipe, network, task)
    downsize.runtimes.RUNTIMES["onnxruntime"].export(made, tmp_path / "made.onnx")
    simulation_equals_artifact(made, tmp_path / "made.onnx", like(task.example, 3, 7))


def test_solvers_take_convolutions_in_three_directions():
    """Each says so of the second convolution; and each errs less than without data."""
    network, task = video()
    x = like(task.example, 16, 99)
    pieces = [[like(task.example, 4, seed)] for seed in range(4)]
    student = network.fork()
    layer = reader(student, "3.weight")
    set_constant(student, layer.args[1], 0.9 * network.tensor("3.weight").detach())
    (told,) = refit_layers(network, student, pieces[:3], pieces[3:], layers=[layer.name])
    assert told.form == "output" and told.after < 1e-6 < told.before
    for by_data, without in (
        ("sparsify(sparsity=0.6)", "sparsify(sparsity=0.6, samples=0)"),
        ("prune(macs=0.6)", "prune(macs=0.6, samples=0)"),
        ("quantize(bits=3, activations='none', group=None)", "quantize(bits=3, activations='none', group=None, rounding='nearest')"),
    ):
        made, plain = (applied(text, network, task) for text in (by_data, without))
        errors = [float((one.predict(x) - network.predict(x)).square().mean()) for one in (made, plain)]
        assert errors[0] < errors[1], by_data


def test_eight_bits_round_convolutions_in_three_directions_by_gptq():
    network, task = video()
    codes = []
    for rounding in ("gptq", "nearest"):
        made = applied(f"quantize(rounding='{rounding}')", network, task)
        codes.append(made.tensor("3.weight").detach())
    assert not torch.equal(*codes)


def reader(network: Network, name: str) -> fx.Node:
    """The node that has this weight."""
    return next(user for node in network.graph.nodes if str(node.target) == name for user in node.users)


def applied(text: str, network: Network, task: Task) -> Network:
    for technique in Recipe.parse(text):
        network = technique(network, task)
    return network
