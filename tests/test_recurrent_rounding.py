"""GPTQ for recurrent layers: what their matrices meet, the textbook on one step, and outputs of a trained LSTM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Net, plain
from test_hessian import agree, textbook
from torch import Tensor, nn

from downsize.network.network import Network
from downsize.network.rewrite import aten
from downsize.numerics.grids import weight_grid
from downsize.numerics.recurrent import what_matrices_meet
from downsize.quantization.formats import Format
from downsize.quantization.grouped import steps_of
from downsize.quantization.placement import place
from downsize.quantization.states import round_recurrent
from downsize.quantization.weight_only import Data, quantize_weight_only

CELLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, aten.lstm.input, {"num_layers": 2}),
    "lstm, two ways, no biases": (nn.LSTM, aten.lstm.input, {"bidirectional": True, "bias": False}),
    "gru": (nn.GRU, aten.gru.input, {"num_layers": 2, "bidirectional": True}),
    "rnn": (nn.RNN, aten.rnn_tanh.input, {}),
}


@pytest.mark.parametrize("name", CELLS)
def test_what_matrices_meet_is_what_a_run_step_by_step_shows(name):
    # Oracle: torch's layer over one step at a time, its state handed on; backwards over the sequence turned round.
    build, cell, options = CELLS[name]
    torch.manual_seed(0)
    layer = build(5, 4, **options)
    parameters, directions = [p.detach() for p in layer.parameters()], 2 if layer.bidirectional else 1
    states, x = torch.randn(layer.num_layers * directions, 3, 4), torch.randn(6, 3, 5)
    hidden = [states, torch.randn_like(states)] if build is nn.LSTM else states
    met = what_matrices_meet(cell, x, hidden, parameters, layer.bias, layer.num_layers, layer.bidirectional)
    count, below = (4 if layer.bias else 2), x
    for number in range(layer.num_layers * directions):
        depth, backwards = divmod(number, directions)
        own = parameters[number * count : (number + 1) * count]
        state = [each[number : number + 1] for each in hidden] if isinstance(hidden, list) else hidden[number : number + 1]
        seen: list[Tensor] = []
        for step in below.flip(0) if backwards else below:
            seen.append(state[0][0] if isinstance(state, list) else state[0])
            _, *last = cell(step[None], state, own, layer.bias, 1, 0.0, False, False, False)
            state = last if isinstance(hidden, list) else last[0]
        expected = torch.stack(seen[::-1] if backwards else seen).flatten(0, 1)
        torch.testing.assert_close(met[2 * number], below.flatten(0, 1))
        torch.testing.assert_close(met[2 * number + 1], expected)
        if number % directions == directions - 1 and depth + 1 < layer.num_layers:
            below = met[2 * number + 2].unflatten(0, (6, 3))  # what the next layer meets; its states then follow from it
    whole = layer(x, tuple(hidden) if isinstance(hidden, list) else hidden)[0].detach()
    last = met[-1 - 2 * (directions - 1)].unflatten(0, (6, 3))  # the last layer's states, forwards: its outputs, one step late
    torch.testing.assert_close(last[1:], whole[:-1, :, :4])


def reader(sequence: int) -> tuple[Network, Tensor]:
    torch.manual_seed(1)
    model = Net(lambda net, x: net.rnn(x)[0], rnn=nn.LSTM(24, 16, batch_first=True))
    mixing = torch.randn(24, 24) * torch.linspace(0.05, 2, 24)
    return plain(model, torch.randn(2, sequence, 24)), torch.randn(64, sequence, 24) @ mixing


def test_one_step_is_rounded_as_the_textbook_does():
    # The state before the only step is zero, so that its matrix is rounded to nearest.
    network, x = reader(1)
    formats = {f"rnn.weight_{side}_l0": Format(4) for side in ("ih", "hh")}
    weights = {name: network.tensor(name).detach().clone() for name in formats}
    found = round_recurrent(network, formats, [[x]], [[x]])
    assert set(found) == set(formats)
    rows, grid = x.flatten(0, 1), weight_grid(4)
    weight, scale = weights["rnn.weight_ih_l0"], found["rnn.weight_ih_l0"].scale

    def nearest(value: float, row: int, _: int) -> float:
        return min(max(round(value / float(scale[row, 0])), grid.low), grid.high) * float(scale[row, 0])

    gram = rows.double().mT @ rows.double()
    agree(network.tensor("rnn.weight_ih_l0").detach(), textbook(weight, gram, nearest), gram, weight)
    state = weights["rnn.weight_hh_l0"]
    step = steps_of(state, Format(4)).scale
    torch.testing.assert_close(network.tensor("rnn.weight_hh_l0").detach(), (state / step).round().clamp(grid.low, grid.high) * step)


def trained() -> tuple[nn.Module, Tensor]:
    """An LSTM that has learned to tell the next of 12 signs of a noisy walk, and walks it has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    pace = torch.randint(1, 4, (320, 1), generator=generator)
    noise = (torch.rand(320, 25, generator=generator) < 0.1) * torch.randint(0, 12, (320, 25), generator=generator)
    walks = (torch.randint(0, 12, (320, 1), generator=generator) + pace * torch.arange(25) + noise) % 12
    parts = {"table": nn.Embedding(12, 16), "rnn": nn.LSTM(16, 32, num_layers=2, batch_first=True), "head": nn.Linear(32, 12)}
    model = Net(lambda net, x: net.head(net.rnn(net.table(x))[0]), **parts)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        batch = walks[(step * 32) % 256 :][:32]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.2  # the noise is not to be told
    return model.eval(), walks[:, :-1]


def test_a_trained_lstm_errs_less_than_rounded_to_nearest():
    # Oracle: the float network's outputs on walks that nothing was fitted on.
    model, walks = trained()
    network = plain(model, walks[:2])
    pieces = [[walks[start : start + 8]] for start in range(0, 192, 8)]
    formats = {f"rnn.weight_{side}_l{layer}": Format(3) for side in ("ih", "hh") for layer in (0, 1)}
    expected, errors = network.predict(walks[256:]), {}
    for rounding in ("nearest", "gptq"):
        made = quantize_weight_only(network, place(network), formats, rounding, Data(pieces[::2], pieces[1::2]))
        errors[rounding] = float((made.predict(walks[256:]) - expected).norm() / expected.norm())
    assert errors["gptq"] < 0.8 * errors["nearest"], errors
    assert np.isfinite(errors["gptq"])
