"""The pass of all members as dynamo calls it: a function of its own, since marking it imports ``torch._dynamo``."""

import torch

from fastens.fold.compiled import evaluate_node

node = torch.compiler.allow_in_graph(evaluate_node)
