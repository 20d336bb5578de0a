"""What dynamo calls as it is: functions of a module of their own, since marking them imports ``torch._dynamo``."""

from collections.abc import Callable
from typing import Any

import torch

from fastens.fold.stand_ins import evaluate_node

node = torch.compiler.allow_in_graph(evaluate_node)


_WHY = (
    "members or dropout masks are drawn anew in each call, which a graph would repeat; or deterministic mode is on, "
    "which a compiler does not keep"
)


@torch.compiler.disable(reason=_WHY)
def untraced(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function outside the graph: torch.compile parts the graph there, or refuses under ``fullgraph=True``."""
    return function(args, kwargs)
