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
_AVERAGES = frozenset(("ema", "emas", "avg", "average", "averages", "averaged", "averaging", "polyak", "swa", "shadow"))
_RAW = frozenset(("online", "raw"))  # ema-pytorch keeps its online model beside the average
_NOT = frozenset(("no", "non", "not", "without", "noema", "nonema"))
_OPTIMISERS = frozenset(("optimizer", "optimiser", "optimizers", "optim", "opt", "scaler", "scheduler", "schedulers"))
# Scalars that averages and wrappers keep beside the weights.
BOOKKEEPING = frozenset(
    ("decay", "initted", "n_averaged", "num_updates", "optimization_step", "step", "epoch", "global_step")
)

RAW, EMA, UNCLEAR, UNSAID = "raw", "EMA", "EMA-like", "unsaid"


def words(component: str) -> list[str]:
    """The words of one name: ``netEMA_0.999`` has "net", "ema" and digits, which are none."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", component)
    return [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]


def kind_of(prefix: Iterable[str]) -> str:
    """What the names in front of a network's own say of its weights.

    Returns:
        ``RAW`` or ``EMA``, by the last name that says either; ``UNCLEAR`` for a name with "ema" inside a word;
        ``UNSAID`` where no name says anything.
    """
    kind = UNSAID
    for component in prefix:
        found = words(component)
        if _RAW.intersection(found) or (_NOT.intersection(found) and any("ema" in word for word in found)):
            kind = RAW
        elif _AVERAGES.intersection(found):
            kind = EMA
        elif any("ema" in word for word in found):
            kind = UNCLEAR
    return kind


def is_optimiser(component: str) -> bool:
    """Whether a dictionary of this name holds the state of an optimiser, a schedule or a gradient scaler."""
    return bool(_OPTIMISERS.intersection(words(component)))


def split(key: str) -> list[str]:
    """The components of a name; the point of a decimal number (``ema_0.9999``) separates nothing."""
    return re.split(r"\.(?!\d)|(?<!\d)\.", key)


def unwrapped(components: Sequence[str]) -> tuple[str, ...]:
    """The components without those that wrappers put in, wherever they stand."""
    return tuple(component for component in components if component not in WRAPPERS)


def decay_in(prefix: Iterable[str]) -> float | None:
    """The decay that names state: 0.9999 of ``ema_0.9999``; none where they state none."""
    found = [re.search(r"(?<!\d)0?\.\d+", component) for component in prefix]
    numbers = [float(match.group()) for match in found if match]
    return numbers[-1] if numbers else None
