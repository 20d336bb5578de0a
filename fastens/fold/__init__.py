"""The fold: a member's network with the members in its batch, layer by layer.

``rows`` says which member a row belongs to, ``member_tensor`` is a parameter that has one value per member,
``registry`` maps a layer to its member-batched counterpart (one file per layer family), ``looped`` runs a module
member by member, ``members`` reads and compares them, and ``network`` puts it all together.
"""

from fastens.fold import attention, conv, embedding, linear, norm, parametrization, recurrent

__all__ = ["attention", "conv", "embedding", "linear", "norm", "parametrization", "recurrent"]
