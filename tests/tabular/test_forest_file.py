"""Files of packed forests: whole ones come back, all others are refused as files."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

import fastens
from tests.tabular.forests import fitted, rows


def saved():
    stream = io.BytesIO()
    fastens.Forest.from_sklearn(fitted(outputs=1)).save(stream)
    return stream.getvalue()


CONTENT = saved()


def changed(**parts):
    """The file with other parts; None leaves one out."""
    fields = dict(np.load(io.BytesIO(CONTENT))) | parts
    stream = io.BytesIO()
    np.savez(stream, **{name: value for name, value in fields.items() if value is not None})
    return stream.getvalue()


def with_header(**fields):
    header = json.loads(np.load(io.BytesIO(CONTENT))["header"].tobytes())
    for name, value in fields.items():
        holder = header["inputs"] if name in header["inputs"] else header
        holder[name] = value
    return changed(header=np.frombuffer(json.dumps(header).encode(), np.uint8))


def refused(content):
    with pytest.raises(ValueError, match="is no forest of fastens"):
        fastens.Forest.load(io.BytesIO(content))


def test_the_parts_make_a_file_that_loads():
    for content in (CONTENT, changed(), with_header()):
        forest = fastens.Forest.load(io.BytesIO(content))
        assert np.array_equal(forest.predict(rows()), fastens.Forest.from_sklearn(fitted(outputs=1)).predict(rows()))


@pytest.mark.parametrize("size", [0, 1, 100, len(CONTENT) // 2, len(CONTENT) - 1])
def test_a_file_that_ends_early_is_refused(size):
    refused(CONTENT[:size])


def test_no_flipped_bit_changes_what_is_loaded():
    """Of a few hundred single bits: refused, or in bytes that say nothing."""
    rng = np.random.default_rng(0)
    expected = fastens.Forest.load(io.BytesIO(CONTENT)).predict(rows())
    outcomes = []
    for place in rng.integers(0, len(CONTENT), 300):
        damaged = bytearray(CONTENT)
        damaged[place] ^= 1 << rng.integers(8)
        try:
            outcomes.append(fastens.Forest.load(io.BytesIO(bytes(damaged))).predict(rows()))
        except ValueError as error:
            outcomes.append(str(error))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(refusals) > 250
    assert all("is no forest of fastens" in message for message in refusals)
    assert all(np.array_equal(outcome, expected) for outcome in outcomes if not isinstance(outcome, str))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_features": 10**9},
        {"num_features": -1},
        {"num_features": 1e1},
        {"num_features": 10**400},
        {"num_features": None},
        {"names": ["a"]},
        {"names": 3},
        {"library": "os"},
        {"estimator": "__import__('os')"},
        {"dtype": "object"},
        {"dtype": "int8"},
        {"double_inputs": "no"},
        {"double_inputs": 1},
        {"single_output": None},
        {"format": "fastens forest 1"},
        {"more": 1},
    ],
    ids=str,
)
def test_headers_out_of_range_are_refused(fields):
    refused(with_header(**fields))


def test_a_header_that_is_nested_without_end_is_refused():
    refused(changed(header=np.frombuffer(b"[" * 100_000, np.uint8)))


@pytest.mark.parametrize(
    "parts",
    [
        {"left": None},
        {"header": None},
        {"more": np.zeros(3)},
        {"values": np.zeros(3, object)},
        {"values": np.zeros((3, 1), complex)},
        {"values": np.zeros((3, 1), "S9")},
        {"offsets": np.zeros(0)},
        {"offsets": np.zeros((2, 2))},
        {"ranges": np.array([0, 10**12])},
        {"ranges": np.array([0.5, 10])},
        {"base": np.zeros(77)},
        {"base": np.array("text")},
    ],
    ids=lambda parts: f"{next(iter(parts))}",
)
def test_parts_that_are_no_forest_are_refused(parts):
    refused(changed(**parts))


def test_a_walk_that_never_ends_is_refused():
    left = np.load(io.BytesIO(CONTENT))["left"].copy()
    left[0] = 0  # its own child
    with pytest.raises(ValueError, match="out of range"):
        fastens.Forest.load(io.BytesIO(changed(left=left)))


def test_a_part_that_would_fill_the_memory_is_refused():
    """A compressed part, and an array whose header is larger than its data."""
    with zipfile.ZipFile(io.BytesIO(CONTENT)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for compression, values in (
        (zipfile.ZIP_DEFLATED, parts["values.npy"]),
        (zipfile.ZIP_STORED, parts["values.npy"].replace(b"'shape': (", b"'shape': (99999999999,", 1)[:128]),
    ):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for name, content in (parts | {"values.npy": values}).items():
                archive.writestr(name, content)
        refused(stream.getvalue())


def test_files_of_others_are_refused(tmp_path):
    for name, content in (("pickle", pickle.dumps({"header": 1})), ("empty", b""), ("text", b"forest\n" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no forest of fastens"):
            fastens.Forest.load(tmp_path / name)
    with pytest.raises(OSError, match="none"):
        fastens.Forest.load(tmp_path / "none")
