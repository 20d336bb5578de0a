"""What the names in a checkpoint say: wrappers, averages, and the weights beside them."""

import re
from collections.abc import Iterable, Sequence

# Modules that hold the network and put their own name into those of its tensors: DistributedDataParallel and
# AveragedModel, torch.compile, FSDP of several versions, activation checkpointing, Lightning Fabric.
WRAPPERS = frozenset(
    (
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    )
)
_AVERAGES = frozenset("ema emas ewma ewa avg average averages averaged averaging polyak swa shadow".split())
# What else is averaged: of these, an average has the weights' names and shapes and is none of the weights.
_OTHER_QUANTITIES = frozenset(
    "grad grads gradient gradients sq square squares squared var variance std fisher loss losses stats".split()
)
# ema-pytorch keeps its online model beside the average, torch_ema and others what they put back after an evaluation.
_RAW = frozenset(("online", "raw", "backup", "collected"))
_NOT = frozenset(("no", "non", "not", "without", "noema", "nonema"))
_OPTIMISERS = frozenset(("optimizer", "optimiser", "optimizers", "optimisers", "optim", "optims"))
# Whole names: momentum_encoder is a network.
_STATES = frozenset("opt exp_avg exp_avg_sq momentum momentum_buffer scaler scheduler grad grads gradients".split())
_WORDS = frozenset(("schema", "cinema", "edema", "emission", "email", "emanate"))  # that end or begin with "ema"
# Scalars that averages and wrappers keep beside the weights.
BOOKKEEPING = frozenset(
    ("decay", "initted", "n_averaged", "num_updates", "optimization_step", "step", "steps", "epoch", "global_step")
)

RAW, EMA, UNCLEAR, UNSAID, STATE = "raw", "EMA", "EMA-like", "unsaid", "optimiser's state"


def words(component: str) -> list[str]:
    """The words of one name: ``netEMA_0.999`` has "net", "ema" and digits, which are none."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", component)
    return [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]


def kind_of(prefix: Iterable[str]) -> str:
    """What the names in front of a network's own say of its weights.

    Returns:
        ``STATE`` for what an optimiser keeps, which has the weights' names and shapes; ``RAW`` or ``EMA``, by the last
        name that says either; ``UNCLEAR`` where a word only begins or ends with "ema", or the average is one of
        gradients, squares, ...; ``UNSAID`` where none does.
    """
    kind = UNSAID
    for component in prefix:
        found = words(component)
        if _OPTIMISERS.intersection(found) or component.lower() in _STATES:
            return STATE
        if _RAW.intersection(found) or (_NOT.intersection(found) and any("ema" in word for word in found)):
            kind = RAW
        elif _AVERAGES.intersection(found):
            kind = UNCLEAR if _OTHER_QUANTITIES.intersection(found) else EMA
        elif any(
            word.startswith("ema") or word.endswith("ema") for word in {*found, *words(component.lower())} - _WORDS
        ):
            kind = UNCLEAR
    return kind


def is_average_in_state(prefix: Sequence[str]) -> bool:
    """Whether an average stands in what an optimiser keeps, as of optimisers that average the weights themselves."""
    kinds = [kind_of((component,)) for component in prefix]
    return STATE in kinds and EMA in kinds[kinds.index(STATE) :]


def split(key: str) -> list[str]:
    """The components of a name; the point of a decimal number (``ema_0.9999``) separates nothing."""
    return re.split(r"\.(?!\d)|(?<!\d)\.", key)


def unwrapped(components: Sequence[str]) -> tuple[str, ...]:
    """The components without those that wrappers put in, wherever they stand."""
    return tuple(component for component in components if component not in WRAPPERS)


def decay_in(prefix: Iterable[str]) -> float | None:
    """Return the decay in names, 0.9999 in ``ema_0.9999``; None where there is none."""
    found = [re.search(r"(?<!\d)0?\.\d+", component) for component in prefix]
    numbers = [float(match.group()) for match in found if match]
    return numbers[-1] if numbers else None
