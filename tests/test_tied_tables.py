"""A table that a linear layer has as its weight, too: factored once for both."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_nets import like, operators
from torch import Tensor, nn
from zoo import assert_close, specimen

import downsize as ds
from downsize.factoring.layers import layers_of, say_as_linear
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.numerics.lowrank import of_tied
from downsize.recipe import Recipe
from downsize.task import Task
from downsize.techniques.factorize import Factorize
from downsize.testing import check_technique, loaded_equals_live, simulation_equals_artifact

TOKENS, WIDTH = 60, 16
IDS = torch.zeros(2, 9, dtype=torch.int64)


class Language(nn.Module):
    """A language model of one residual layer; ``read`` scores every token by the table."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor] = nn.functional.linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down, self.read = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), read
        with torch.no_grad():
            # Near to low rank, as after training.
            left, values, right = torch.linalg.svd(self.table.weight, full_matrices=False)
            self.table.weight.copy_(left * values * torch.exp(-torch.arange(WIDTH) / 4) @ right)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.read(x + self.down(torch.tanh(self.up(x))), self.table.weight)


def ids(seed: int) -> Tensor:
    """Tokens of which some are frequent: Zipf's law."""
    share = 1 / torch.arange(1, TOKENS + 1)
    return torch.multinomial(share, 8 * 9, True, generator=torch.Generator().manual_seed(seed)).reshape(8, 9)


@functools.cache
def language() -> tuple[Network, Task]:
    torch.set_num_threads(1)
    model = Language().eval()
    batches = [(ids(seed), None) for seed in range(12)]
    return capture(model, IDS), Task(model, IDS, {"calibrate": lambda: batches, "train": lambda: batches})


def test_the_spectrum_is_that_of_the_weighed_table():
    """Oracles: numpy's singular values of the table, rows and columns weighed as documented; the errors of both outputs, made."""
    generator = np.random.default_rng(0)
    table, inputs = generator.normal(size=(30, 8)), generator.normal(size=(200, 8)) * np.arange(1, 9) + 3
    counts = generator.integers(1, 50, 30).astype(float)
    rows = np.concatenate([inputs, np.ones((200, 1))], 1)
    found = of_tied(torch.tensor(table), torch.tensor(counts), torch.tensor(rows.T @ rows))
    covariance = np.cov(inputs.T)
    columns = (covariance / np.trace(covariance) * 8 + np.eye(8)) / 2
    weighed = np.sqrt((counts / counts.mean() + 1) / 2)[:, None] * table @ np.linalg.cholesky(columns)
    values = np.linalg.svd(weighed, compute_uv=False)
    np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-7)
    tokens = np.repeat(np.arange(30), counts.astype(int))
    looked_up, scores = table[tokens], inputs @ table.T
    for rank in range(9):
        first, second, shift = (part.numpy() for part in found.factors(rank))
        smaller = second @ first
        np.testing.assert_allclose(shift, (table - smaller) @ inputs.mean(0), atol=1e-8)
        # Those of the two outputs, on the data.
        errors = [
            np.square(looked_up - smaller[tokens]).sum() / np.square(looked_up - looked_up.mean(0)).sum(),
            np.square(scores - inputs @ smaller.T - shift).sum() / np.square(scores - scores.mean(0)).sum(),
        ]
        assert found.error(rank) == pytest.approx(np.mean(errors), abs=1e-9)


def test_without_data_it_is_the_tables_own():
    table = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    found = of_tied(table, torch.zeros(30))
    assert_close(found.values, torch.linalg.svdvals(table.double()), 1e-9)
    assert not found.factors(3)[2].any()


def test_both_have_one_narrow_table_and_laws_hold(tmp_path: Path):
    network, task = language()
    step = Factorize(parameters=0.6, multiple=1, samples=64)
    made = check_technique(step, network, task)
    assert made.origin["factorized"]["table.weight"].startswith("tied ")
    weights = {name: tuple(tensor.shape) for name, tensor in made.named_tensors() if name.startswith("table")}
    rank = weights["table.first.weight"][1]
    assert weights["table.first.weight"] == (TOKENS, rank) and weights["table.second.weight"] == (WIDTH, rank)
    assert weights["table.third.weight"] == (rank, WIDTH) and weights["table.first.bias"] == (TOKENS,)
    assert count(made, IDS).parameters <= 0.6 * count(network, IDS).parameters
    loaded = loaded_equals_live(made, ids(100), tmp_path)
    assert len({id(tensor) for name, tensor in loaded.named_tensors() if tensor.shape == (TOKENS, rank)}) == 1


def test_the_outputs_move_less_than_by_plain_truncation():
    network, task = language()
    errors = {}
    for samples in (0, 64):
        made = Factorize(ratio=0.4, multiple=1, samples=samples, refit=False, what=("embedding", "linear"))(network, task)
        errors[samples] = float((made.predict(ids(100)) - network.predict(ids(100))).square().mean())
    assert errors[64] < 0.9 * errors[0]


READERS = {
    "t": lambda x, w: x @ w.t(),
    "T": lambda x, w: torch.matmul(x, w.T),
    "mT": lambda x, w: x @ w.mT,
    "transpose": lambda x, w: x @ w.transpose(-1, -2),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "mm": lambda x, w: torch.mm(x.reshape(-1, WIDTH), w.t()),
}


@pytest.mark.parametrize("read", READERS)
def test_a_product_with_the_transposed_table_is_such_a_layer(read: str):
    model = Language(READERS[read]).eval()
    network = capture(model, IDS)
    plain = network.fork()
    say_as_linear(plain)
    assert [layer.kind for layer in layers_of(plain, ("embedding", "linear"))[0]].count("embedding") == 1
    assert operators(plain)["linear"] == 3 and not {"numpy_T", "t", "mT", "transpose", "permute", "matmul"} & operators(plain).keys()
    assert_close(plain.predict(ids(1)), network.predict(ids(1)), 1e-6)
    task = Task(model, IDS, {"calibrate": lambda: [(ids(seed), None) for seed in range(8)]})
    made = Factorize(parameters=0.6, multiple=1, samples=32)(network, task)
    assert made.origin["factorized"]["table.weight"].startswith("tied ")


def test_where_something_else_reads_the_table_it_stays():
    cases = {
        "the sum": lambda x, w: nn.functional.linear(x, w) + w.sum(),
        "both ways": lambda x, w: nn.functional.linear(x, w) @ w,
        "a matrix added": lambda x, w: torch.addmm(torch.ones(1, TOKENS), x.reshape(-1, WIDTH), w.t()),
        "a turned cube": lambda x, w: x @ w.unsqueeze(0).transpose(-1, -2),
    }
    for read in cases.values():
        network = capture(Language(read).eval(), IDS)
        say_as_linear(network)
        layers, left = layers_of(network, ("embedding", "linear"))
        assert [layer.name for layer in layers] == ["up.weight", "down.weight"]
        assert left["table.weight"] == "its weight is read in other ways, too"


def test_the_ranks_of_both_are_learned():
    network, task = language()
    made = Factorize(parameters=0.6, multiple=1, train=ds.finetune(steps=24))(network, task)
    assert made.origin["factorized"]["table.weight"].startswith("tied ") and "trained" in str(made.origin)
    assert count(made, IDS).parameters <= 0.6 * count(network, IDS).parameters


@pytest.mark.parametrize(
    "recipe",
    [
        "factorize(parameters=0.6, multiple=1, samples=64) | quantize()",
        "factorize(parameters=0.6, multiple=1, samples=64) | quantize(bits=4, tables=4, group=16, activations='none')",
        "factorize(size=0.6, multiple=1, samples=64) | prune(parameters=0.9, multiple=1) | quantize()",
        "prune(parameters=0.9, multiple=1) | factorize(parameters=0.6, multiple=1, samples=64) | halve()",
    ],
)
def test_in_chains_the_file_computes_what_the_network_does(recipe: str, tmp_path: Path):
    network, task = language()
    made = network
    for technique in Recipe.parse(recipe):
        made = technique(made, task)
    ds.runtimes.RUNTIMES["onnxruntime"].export(made, tmp_path / "made.onnx")
    simulation_equals_artifact(made, tmp_path / "made.onnx", ids(100))
    assert ".first.weight" in " ".join(name for name, _ in made.named_tensors())


def test_layers_that_are_called_twice_and_tied_tables_stand_in_one_network():
    model, network = specimen("tied")
    task = Task(model, IDS, {"calibrate": lambda: [(like(IDS, 4, seed), None) for seed in range(6)]})
    made = check_technique(Factorize(ratio=0.7, multiple=1), network, task)
    assert any(note.startswith("tied ") for note in made.origin["factorized"].values())
