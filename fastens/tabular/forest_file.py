"""The file of a packed forest: a header of JSON and arrays, of which nothing is executed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastens.files import whole
from fastens.reference.forest import Trees
from fastens.tabular.inputs import Inputs

FORMAT = "fastens forest 2"
ARRAYS = ("offsets", "feature", "threshold", "left", "right", "default_left", "values", "ranges", "base")
ABOUT = {"double_inputs": bool, "allow_inf": bool, "single_output": bool, "dtype": str}


def write(
    file: str | os.PathLike[str] | BinaryIO,
    trees: Trees,
    ranges: npt.NDArray,
    base: npt.NDArray,
    inputs: Inputs,
    about: dict[str, Any],
) -> None:
    """Write a forest to one file, whole or not at all where a path is given.

    Raises:
        OSError: it cannot be written.
    """
    header = {"format": FORMAT, **about, "inputs": dataclasses.asdict(inputs)}
    arrays: dict[str, Any] = {name: getattr(trees, name) for name in ARRAYS[:-2]} | {"ranges": ranges, "base": base}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    if isinstance(file, str | os.PathLike):
        with whole(Path(file)) as (partial,), partial.open("wb") as stream:
            np.savez(stream, **arrays)
    else:
        np.savez(file, **arrays)


@contextlib.contextmanager
def reading(file: str | os.PathLike[str] | BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the arguments of :class:`fastens.Forest`; whatever goes wrong in the block is the file's fault.

    Raises:
        ValueError: not such a file, or a damaged one.
        OSError: it cannot be read.
    """
    content = Path(file).read_bytes() if isinstance(file, str | os.PathLike) else file.read()
    try:
        yield _parsed(content)
    except Exception as error:  # of zip files, their compression, arrays, JSON, and the checks of the parts
        name = file if isinstance(file, str | os.PathLike) else getattr(file, "name", "this stream")
        raise ValueError(f"{name} is no forest of fastens, or a damaged one: {error}") from error


def _parsed(content: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if sorted(members) != sorted((*ARRAYS, "header")) or len(archive.infolist()) != len(members):
            raise ValueError(f"it holds {sorted(members)[:12]}, expected {sorted((*ARRAYS, 'header'))}")
        # As they are stored they take no more memory than the file; and they are read to the end, where sums are held.
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("its parts are compressed")
        parts = {name: _array(archive.read(info)) for name, info in members.items()}
    header = json.loads(parts.pop("header").tobytes())
    if header.pop("format") != FORMAT:
        raise ValueError(f"another format, expected {FORMAT!r}: pack the model again")
    given = header.pop("inputs")
    names = given.pop("names")
    inputs = Inputs(**given, names=None if names is None else tuple(names))
    if {name: type(value) for name, value in header.items()} != ABOUT:
        raise ValueError(f"its header has {header}, expected {', '.join(ABOUT)}")
    ranges, base = parts.pop("ranges"), parts.pop("base")
    trees = Trees(**parts, num_features=inputs.num_features)
    return {"trees": trees, "ranges": ranges, "base": base, "inputs": inputs, **header}


def _array(content: bytes) -> npt.NDArray:
    """An array in NumPy's format that fills its part of the file: no header asks for more memory than that."""
    stream = io.BytesIO(content)
    major, _ = np.lib.format.read_magic(stream)
    if major != 1:
        raise ValueError("an array of another version of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype}")
    data = np.frombuffer(content, dtype, offset=stream.tell())
    return data.reshape(shape, order="F" if fortran else "C")
