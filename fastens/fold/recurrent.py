"""Recurrent layers: step by step for all members at once where nothing is differentiated, else looped."""

from typing import Any

import torch
from torch import Tensor, nn

from fastens.fold.looped import run_looped
from fastens.fold.registry import FoldedLayer, register_layer
from fastens.ops.linear import linear

# Of longer sequences a plan would have too many steps.
MOST_STEPS = 128

State = tuple[Tensor, ...]  # the hidden state [R, H], and for LSTM the cell's


class FoldedRecurrent(FoldedLayer):
    """GRU, LSTM or RNN of all members: on a CPU steps of a plan, elsewhere torch's kernels member by member."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run all members step by step, or each on its rows; states are [layers, rows, width]."""
        why = self._refuses(input, hx)
        if why is not None:
            self.looped = why
            return self._looped(input, hx)
        self.looped = None
        return self._stepwise(input)

    def _refuses(self, x: Any, hx: Any) -> str | None:
        """Why the layer is looped, or none."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "recurrent kernels take one set of weights"
        if hx is not None or not isinstance(x, Tensor) or x.ndim != 3 or x.device.type != "cpu":
            return "recurrent kernels take one set of weights, and steps start at a state of zeros"
        batch, time = (0, 1) if self.batch_first else (1, 0)
        if self.proj_size or (self.dropout and self.training):
            return "recurrent kernels take one set of weights, and steps neither project nor drop"
        if not 0 < x.shape[time] <= MOST_STEPS or x.shape[batch] != self.rows.total:
            return f"recurrent kernels take one set of weights, and steps 1 to {MOST_STEPS} times of the batch's rows"
        return None

    def _looped(self, x: Any, hx: Any) -> Any:
        states = [] if hx is None else [1] * (2 if isinstance(hx, tuple) else 1)
        batch = 0 if self.batch_first else 1
        self.layout = ([batch, *states], [batch, 1, 1] if self.mode == "LSTM" else [batch, 1])
        return run_looped(self, (x,) if hx is None else (x, hx), {})

    def _stepwise(self, x: Tensor) -> Any:
        x = x if self.batch_first else x.transpose(0, 1)
        last: list[State] = []
        for layer in range(self.num_layers):
            sides = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                outputs, state = self._layer(x, f"_l{layer}{suffix}", bool(suffix))
                sides.append(torch.stack(outputs, 1))
                last.append(state)
            x = sides[0] if len(sides) == 1 else torch.cat(sides, 2)
        states = tuple(torch.stack(column) for column in zip(*last, strict=True))  # [layers * directions, R, H]
        return x if self.batch_first else x.transpose(0, 1), states if self.mode == "LSTM" else states[0]

    def _layer(self, x: Tensor, name: str, reverse: bool) -> tuple[list[Tensor], State]:
        """Hidden states of one layer and direction in the order of time, and the state at its end."""
        weight_ih, weight_hh, bias_ih, bias_hh = (
            self.stack(part + name) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        assert weight_ih is not None
        assert weight_hh is not None
        offsets = self.rows.offsets
        inputs = linear(x, weight_ih, bias_ih, offsets)  # [R, T, gates * H]
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        state = (zeros, zeros) if self.mode == "LSTM" else (zeros,)
        times = range(x.shape[1])
        outputs = []
        for t in reversed(times) if reverse else times:
            state = self._cell(inputs[:, t], linear(state[0], weight_hh, bias_hh, offsets), state)
            outputs.append(state[0])
        return outputs[::-1] if reverse else outputs, state

    def _cell(self, of_input: Tensor, of_hidden: Tensor, state: State) -> State:
        """One step from the gates' shares [R, gates * H] of the input and of the hidden state."""
        width = self.hidden_size
        if self.mode == "GRU":
            gates = (of_input[:, : 2 * width] + of_hidden[:, : 2 * width]).sigmoid()
            reset, update = gates.chunk(2, 1)
            new = (of_input[:, 2 * width :] + reset * of_hidden[:, 2 * width :]).tanh()
            return (new + update * (state[0] - new),)
        total = of_input + of_hidden
        if self.mode == "LSTM":
            take, forget, new, give = total.chunk(4, 1)
            cell = forget.sigmoid() * state[1] + take.sigmoid() * new.tanh()
            return give.sigmoid() * cell.tanh(), cell
        return (total.tanh() if self.mode == "RNN_TANH" else total.relu(),)


for _layer in (nn.GRU, nn.LSTM, nn.RNN):
    register_layer(_layer, FoldedRecurrent)
