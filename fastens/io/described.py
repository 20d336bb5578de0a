"""Networks that a ``config.json`` of diffusers describes, made without their weights and without the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastens.io import containers


def factory(folder: Path) -> Callable[[], nn.Module]:
    """A function that makes the network of a diffusers folder's ``config.json``, without its weights.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the file describes no model of diffusers.
    """
    file = folder / "config.json"
    config = containers.read_json(file)
    diffusers_class(file, config.get("_class_name"))
    return lambda: make(file, config.get("_class_name"), config)


def diffusers_class(where: Path, name: Any) -> Any:
    """The diffusers model class of a name.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: it has no model of that name.
    """
    try:
        import diffusers
        from diffusers.models.modeling_utils import ModelMixin
    except ImportError as error:
        raise ImportError(f"{where} describes a diffusers model: pip install 'fastens[diffusers]'") from error
    found = None
    if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        try:
            found = getattr(diffusers, name, None)
        except (ImportError, RuntimeError) as error:  # its lazy modules
            raise ValueError(f"{where} names the class {name!r}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(
            f"{where} names the class {name!r}, which diffusers {diffusers.__version__} has not among its models; of "
            "another library, pass factory=, which makes the network"
        )
    return found


def make(where: Path, name: Any, config: Any, numbers: int | None = None) -> nn.Module:
    """The network of a configuration.

    Args:
        where: the configuration came from, for messages.
        name: of the class.
        config: the class's parameters: a dictionary. A string would be looked up on the network.
        numbers: how many the weights are; a network of many more is not made, as it may not fit the memory.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: no such class, or parameters that it does not take.
    """
    model_class = diffusers_class(where, name)
    if not isinstance(config, dict):
        raise ValueError(f"{where}: the configuration of {name} is a {type(config).__name__}, expected a dictionary")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{where} describes quantised weights; load it with diffusers, and dequantise it first")
    # What a model noted as left at its defaults would be taken from the defaults of today, whatever the file says.
    said = {key: value for key, value in config.items() if key != "_use_default_values"}
    if numbers is not None and _size(model_class, said) > 2 * numbers + 1_000_000:
        raise ValueError(f"{where} describes a {name} that is far larger than its {numbers:,} weights")
    try:
        return model_class.from_config(said)
    except Exception as error:  # values that the constructor did not expect raise anything there
        raise ValueError(f"{where} describes no {name}: {type(error).__name__}: {error}") from error


def _size(model_class: Any, config: dict[str, Any]) -> int:
    """How many numbers a network has, found without memory for them; zero where that cannot be found."""
    try:
        with torch.device("meta"):
            shell = model_class.from_config(config)
    except Exception:  # the constructor computes with values, or raises what it will raise again
        return 0
    return sum(tensor.numel() for tensor in {id(t): t for t in shell.parameters()}.values())


def kept_in_float32(network: nn.Module) -> set[str]:
    """The names of modules that diffusers leaves in float32 where a network is loaded in another dtype."""
    names = getattr(network, "_keep_in_fp32_modules", None) or ()
    return {names} if isinstance(names, str) else set(names)


def adapted(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that this diffusers gives them, where an older one named them otherwise."""
    rename = getattr(network, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        tensors = dict(tensors)
        rename(tensors)
    return tensors
