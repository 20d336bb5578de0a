"""Steps that change what is inside of values that modules hold."""

from random import Random
from typing import Any

import torch

from tests.fuzz.changes import again
from tests.fuzz.run import Run
from tests.fuzz.sequences import step
from tests.fuzz.state import Stateful

INSIDE = {
    "list": lambda kept, value: kept.__setitem__(1, value),
    "dict": lambda kept, value: kept.update(gain=value),
    "dataclass": lambda kept, value: setattr(kept, "gain", value),
    "namespace": lambda kept, value: setattr(kept, "gain", value),
    "array": lambda kept, value: kept.__setitem__(1, value),
    "nested": lambda kept, value: kept["levels"][0][1].update(gain=value),
    "tensor": lambda kept, value: kept.fill_(value),
    "tensors": lambda kept, value: kept[1].fill_(value),
    "named_tensors": lambda kept, value: kept["gain"].fill_(value),
}


@step(1.5)
def content(run: Run, draw: Random) -> None:
    """An item of every container that blocks hold; of members that differ, what cannot be done to all is refused."""
    value, run.altered = draw.uniform(0.3, 3.0), True

    def change(module: Any) -> None:
        for block in module.blocks.modules():
            if isinstance(block, Stateful) and block.how in INSIDE:
                with torch.no_grad():
                    INSIDE[block.how](block.kept, value)

    run.allowed = run.allowed or run.spec.tagged("differs", True)
    again(run, draw, lambda: run.each(change))
