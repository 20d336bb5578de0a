"""Recurrent layers: looped over the members, since their kernels take one set of weights."""

from typing import Any

from torch import Tensor, nn

from fastens.fold.looped import run_looped
from fastens.fold.registry import FoldedLayer, register_layer


class FoldedRecurrent(FoldedLayer):
    """GRU, LSTM or RNN of all members, one after the other."""

    looped = "recurrent kernels take one set of weights"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run each member on its rows; states are [layers, rows, width]."""
        states = [] if hx is None else [1] * (2 if isinstance(hx, tuple) else 1)
        batch = 0 if self.batch_first else 1
        self.layout = ([batch, *states], [batch, 1, 1] if self.mode == "LSTM" else [batch, 1])
        return run_looped(self, (input,) if hx is None else (input, hx), {})


for _layer in (nn.GRU, nn.LSTM, nn.RNN):
    register_layer(_layer, FoldedRecurrent)
