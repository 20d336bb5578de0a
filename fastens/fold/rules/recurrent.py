"""Recurrent layers: step by step for all members where nothing is differentiated, else entry by entry."""

from typing import Any

import torch
from torch import Tensor

from fastens.fold.dispatch import Fold, dispatch, rule
from fastens.fold.tensor import NotFoldable

# Of longer sequences a plan would have too many steps.
MOST_STEPS = 128


def _layers(
    fold: Fold, func: Any, input: Any, hx: Any, params: Any, has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """``torch.gru`` and its like; states are [layers * directions, B, width]."""
    name = func.__name__
    tall = input.ndim != 3 or isinstance(batch_first, Tensor)
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    if torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    if tall or torch.is_grad_enabled() or (dropout and train) or input.device.type != "cpu":
        return NotImplemented
    time = input.shape[1 if batch_first else 0]
    directions = 2 if bidirectional else 1
    per_layer = 4 if has_biases else 2
    if fold.recording and time > MOST_STEPS:
        raise NotFoldable(f"a sequence of {time} steps, of which a plan would have thousands")
    if not 0 < time <= MOST_STEPS or len(params) != num_layers * directions * per_layer:
        return NotImplemented  # projections have one more weight

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return dispatch(fold, function, args, kwargs)

    x = input if batch_first else call(Tensor.transpose, input, 0, 1)
    last: list[tuple[Any, ...]] = []
    for layer in range(num_layers):
        sides = []
        for side in range(directions):
            entry = layer * directions + side
            weights = list(params[entry * per_layer : (entry + 1) * per_layer]) + [None] * (4 - per_layer)
            state = tuple(call(Tensor.select, s, 0, entry) for s in states)
            inputs = call(torch.nn.functional.linear, x, weights[0], weights[2])
            outputs = []
            for t in range(time - 1, -1, -1) if side else range(time):
                of_hidden = call(torch.nn.functional.linear, state[0], weights[1], weights[3])
                state = _cell(call, name, call(Tensor.select, inputs, 1, t), of_hidden, state)
                outputs.append(state[0])
            sides.append(call(torch.stack, outputs[::-1] if side else outputs, 1))
            last.append(state)
        x = sides[0] if len(sides) == 1 else call(torch.cat, sides, 2)
    final = tuple(call(torch.stack, column, 0) for column in map(list, zip(*last, strict=True)))
    return (x if batch_first else call(Tensor.transpose, x, 0, 1), *final)


def _cell(call: Any, name: str, of_input: Any, of_hidden: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    """One step from the gates' shares [B, gates * width] of the input and of the hidden state."""
    width = state[0].shape[-1]
    if name == "gru":
        reset_update = slice(2 * width)
        total = call(
            torch.add,
            call(Tensor.__getitem__, of_input, (slice(None), reset_update)),
            call(Tensor.__getitem__, of_hidden, (slice(None), reset_update)),
        )
        reset, update = call(Tensor.chunk, call(torch.sigmoid, total), 2, 1)
        rest = slice(2 * width, None)
        inner = call(torch.mul, reset, call(Tensor.__getitem__, of_hidden, (slice(None), rest)))
        new = call(torch.tanh, call(torch.add, call(Tensor.__getitem__, of_input, (slice(None), rest)), inner))
        return (call(torch.add, new, call(torch.mul, update, call(torch.sub, state[0], new))),)
    total = call(torch.add, of_input, of_hidden)
    if name == "lstm":
        take, forget, new, give = call(Tensor.chunk, total, 4, 1)
        kept = call(torch.mul, call(torch.sigmoid, forget), state[1])
        cell = call(torch.add, kept, call(torch.mul, call(torch.sigmoid, take), call(torch.tanh, new)))
        return call(torch.mul, call(torch.sigmoid, give), call(torch.tanh, cell)), cell
    return (call(torch.tanh if name == "rnn_tanh" else torch.relu, total),)


for _name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
    rule(getattr(torch, _name))(_layers)
