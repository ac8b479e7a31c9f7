"""Recurrent layers: an LSTM whose inputs and states are quantized by their own ranges at every product, as ONNX Runtime's DynamicQuantizeLSTM
computes it; and what the matrices of any recurrent layer meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .grids import fake_quantize_dynamic


@torch.library.custom_op("downsize::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor, hidden: Sequence[Tensor], parameters: Sequence[Tensor], biased: bool, layers: int, dropout: float, train: bool, both: bool, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.lstm.input`` in evaluation, but that each layer's whole input has one scale and zero point, and so has the state at each step.

    Args: those of ``aten.lstm.input``; ``x``: [batch, time, features] where ``first``, else [time, batch, features]; ``hidden``: state and
    cell, [layers * directions, batch, width] each; ``parameters``: of each layer and direction weights for input and state [4 * width,
    columns], gates in the order input, forget, cell, output, and two biases where ``biased``.

    Returns: the outputs, shaped as ``x``, and the last states and cells. Directions lie one behind the other.
    """
    value = x.transpose(0, 1) if first else x
    count, directions = 4 if biased else 2, 2 if both else 1
    states, cells = [], []
    for layer in range(layers):
        rounded, outputs = fake_quantize_dynamic(value), []
        for direction in range(directions):
            number = layer * directions + direction
            own = parameters[number * count : (number + 1) * count]
            output, state, cell = _direction(rounded, hidden[0][number], hidden[1][number], own, bool(direction))
            outputs.append(output)
            states.append(state)
            cells.append(cell)
        value = torch.cat(outputs, -1)
    return (value.transpose(0, 1) if first else value).contiguous(), torch.stack(states), torch.stack(cells)


def _direction(x: Tensor, state: Tensor, cell: Tensor, parameters: Sequence[Tensor], backwards: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction over ``x`` [time, batch, features], which is rounded already."""
    known = torch.nn.functional.linear(x, parameters[0], sum(parameters[2:]) if len(parameters) > 2 else None)  # type: ignore[arg-type]
    outputs = []
    for gates in known.flip(0) if backwards else known:
        entry, forget, new, out = (gates + fake_quantize_dynamic(state) @ parameters[1].mT).chunk(4, -1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * new.tanh()
        state = out.sigmoid() * cell.tanh()
        outputs.append(state)
    made = torch.stack(outputs) if outputs else known.new_empty(0, *state.shape)
    return made.flip(0) if backwards else made, state, cell


@dynamic_lstm.register_fake
def _(
    x: Tensor, hidden: Sequence[Tensor], parameters: Sequence[Tensor], biased: bool, layers: int, dropout: float, train: bool, both: bool, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = hidden[0].shape[-1] * (2 if both else 1)
    return x.new_empty([*x.shape[:-1], width]), torch.empty_like(hidden[0]), torch.empty_like(hidden[1])


def what_matrices_meet(
    cell: Callable[..., Any], x: Tensor, hidden: Tensor | Sequence[Tensor], parameters: Sequence[Tensor], biased: bool, layers: int, both: bool
) -> list[Tensor]:
    """What the matrices of a recurrent layer multiply, [time * batch, columns]: for input and state, of every layer and direction in turn.

    Args: ``cell``: the operator, such as ``aten.gru.input``; the others: its arguments, ``x`` [time, batch, features]. The state that a step
    multiplies is the output of the step before, or the initial one.
    """
    directions, met = 2 if both else 1, []
    count = (4 if biased else 2) * directions
    for layer in range(layers):
        own = slice(layer * directions, (layer + 1) * directions)
        start = hidden[own] if isinstance(hidden, Tensor) else [each[own] for each in hidden]
        output = cell(x, start, parameters[layer * count : (layer + 1) * count], biased, 1, 0.0, False, both, False)[0]
        initial = start if isinstance(start, Tensor) else start[0]
        for direction, states in enumerate(output.chunk(directions, -1)):
            ends = initial[direction][None]
            before = torch.cat([states[1:], ends]) if direction else torch.cat([ends, states[:-1]])
            met += [x.flatten(0, 1), before.flatten(0, 1)]
        x = output
    return met
