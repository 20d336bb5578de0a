"""What dynamo calls as it is: a function of a module of its own, since marking it imports ``torch._dynamo``."""

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastens.network.handed_out import BY_NUMBER


@torch.compiler.assume_constant_result  # for as long as a graph holds: it is traced anew where the first member changes
def followed(number: str) -> bool:
    """Do to all members what others did to the first of them; true."""
    with unset_fake_temporarily():
        BY_NUMBER[number].get()
    return True
