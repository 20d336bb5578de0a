"""Torch files and pickles, read without running what they name.

``torch.load(weights_only=True)`` refuses whole files for one harmless record, such as the ``argparse.Namespace`` that
training scripts keep beside the weights. Such records are read here as inert values of no behaviour: no class of theirs
is imported. A file that names anything else is refused, or read whole where the caller trusts it.
"""

from __future__ import annotations

import collections
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

# Records that hold settings. What is here is not imported, only allowed to be present: a file that also names functions
# to call (os.system, ...) is one that somebody made to harm.
_RECORDS = (
    "_codecs.encode",
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "collections.deque",
    "datetime.",
    "omegaconf.",
    "pathlib.",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
    "numpy.dtypes.",
    "types.SimpleNamespace",
    "typing.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "easydict.EasyDict",
    "ml_collections.config_dict.config_dict.",
    "yacs.config.CfgNode",
    "addict.",
    "dnnlib.util.EasyDict",
    "torch.optim.",
    "functools.partial",
    "__builtin__.",
    "builtins.",
)
_HARMLESS_BUILTINS = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "str", "bool", "slice", "complex")
_TENSORS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in (
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",  # float8, unsigned integers
            "_rebuild_parameter",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_qtensor",
            "_rebuild_sparse_tensor",
        )
    },
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


class NotRun(ValueError):
    """A file that names code, which was not run."""


class Inert(dict):
    """What a pickle would have made by calling something: its contents are kept, nothing is called."""

    described = "a record"

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Take the arguments of whatever it stands for."""
        return dict.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Keep no state: what it means is its class's to say."""

    def append(self, value: Any) -> None:
        """Take an item of a list, as unpickling does."""

    def extend(self, values: Any) -> None:
        """Take items of a list, as unpickling does."""

    def add(self, value: Any) -> None:
        """Take an item of a set, as unpickling does."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item of a dictionary, as unpickling does."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]  # by identity, since __eq__ is defined


def _is_record(name: str) -> bool:
    if name.startswith(("builtins.", "__builtin__.")):
        return name.partition(".")[2] in _HARMLESS_BUILTINS
    return name.startswith(_RECORDS)


def read(path: Path, trusted: bool) -> Any:
    """What a torch file holds.

    Args:
        path: of the file.
        trusted: run the code that it names, where it names any.

    Raises:
        NotRun: it names code, and is not trusted.
        ValueError: it cannot be read.
    """
    if is_script(path):
        raise ValueError(
            f"checkpoint {path} is a TorchScript archive, which is a program; save its weights with "
            "torch.save(torch.jit.load(path).state_dict(), ...)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = error
    except Exception as error:  # a damaged file raises anything: KeyError, struct.error, UnicodeDecodeError, ...
        raise _damaged(path, error) from error
    content, named = _inert(path)
    code = sorted(name for name in named if not _is_record(name))
    if not code and named:
        return content
    if trusted:
        return _run(path)
    if not named:
        raise ValueError(
            f"checkpoint {path} cannot be read, it may be truncated; expected safetensors or a torch file, and it "
            "neither is one nor a pickle that would execute code"
        ) from refused
    raise NotRun(refusal(path, code))


def read_pickle(path: Path) -> Any:
    """What a pickle makes, by running the code that it names: for files whose authors are trusted.

    Raises:
        ValueError: it cannot be read, or its classes cannot be imported.
    """
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    except OSError:
        raise
    except ImportError as error:
        raise ValueError(
            f"checkpoint {path} needs the code that made it, and {error.name} cannot be imported: put that code's "
            "folder on sys.path"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def named_in(path: Path) -> list[str]:
    """The classes and functions that a pickle names; nothing of it is run.

    Raises:
        ValueError: it is no pickle.
    """
    strings: list[str] = []
    found = set()
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if isinstance(argument, str):
                strings.append(argument)
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                found.add(".".join(strings[-2:]))
    except Exception as error:
        raise _damaged(path, error) from error
    return sorted(found)


def refusal(path: Path, code: list[str]) -> str:
    """The message for a file that names code."""
    what = f"names {', '.join(code[:3])}{', ...' if len(code) > 3 else ''}, so reading it" if code else "is one that"
    return (
        f"checkpoint {path} is a pickle that {what} can execute code; if you trust it, pass allow_pickle=True to "
        "load_members, or load it yourself and save its weights with "
        "safetensors.torch.save_file(model.state_dict(), ...) or model.save_pretrained(...)"
    )


def is_zip(path: Path) -> bool:
    """Whether a file is an archive, as ``torch.save`` writes, whatever it is called."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which torch would run."""
    return is_zip(path) and any(name.rpartition("/")[2] == "constants.pkl" for name in names_in_archive(path))


def names_in_archive(path: Path) -> list[str]:
    """Return the names of the files in a zip archive, None for a damaged one: torch's own error is better."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # a damaged archive raises anything
        return []


def _inert(path: Path) -> tuple[Any, set[str]]:
    named: set[str] = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _TENSORS:
                return _TENSORS[module, name]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.qscheme):
                return getattr(torch, name)
            whole = f"{module}.{name}"
            named.add(whole)
            return type("Inert", (Inert,), {"described": whole})

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = SimpleNamespace(__name__="inert", Unpickler=Unpickler, load=load)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    except Exception as error:
        if any(not _is_record(name) for name in named):  # it calls what only code would answer
            return None, named
        if named:
            raise _damaged(path, error) from error
        return None, set()
    return content, named


def _run(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except ImportError as error:
        raise ValueError(
            f"checkpoint {path} needs the code that made it, and {error.name} cannot be imported: put that code's "
            "folder on sys.path"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> ValueError:
    said = " ".join(str(error).split())[:300]
    return ValueError(f"checkpoint {path} cannot be read, it may be truncated: {type(error).__name__}: {said}")
