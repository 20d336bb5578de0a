"""Random tables in everything that holds one: arrays of every dtype and layout, frames, sparse matrices, lists."""

import decimal
import fractions
import importlib.util
import tempfile

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from tests.tabular.models import SPECIAL, choice

LARGE = [np.inf, -np.inf, 1e300, -1e300, 3.4028235e38, 3.4028236e38, 2.0**24 + 1, 2.0**53, 2.0**62, -(2.0**63)]


def values(rng, x, forest):
    """Rows [n, d]: training values, thresholds and their neighbours, and what is special; some NaN, some infinite."""
    n, d = int(rng.integers(1, 30)), x.shape[1]
    cuts = forest.trees.threshold[forest.trees.feature >= 0]
    cuts = cuts if len(cuts) else np.zeros(1)
    with np.errstate(over="ignore"):
        narrow = cuts.astype(np.float32)
        near = [cuts, narrow, np.nextafter(cuts, np.inf), np.nextafter(cuts, -np.inf)]
        near += [np.nextafter(narrow, np.float32(np.inf)), np.nextafter(narrow, np.float32(-np.inf))]
    near = np.concatenate([np.asarray(part, np.float64) for part in near])
    pools = [x[~np.isnan(x)], near, np.array(SPECIAL), rng.normal(size=50)]
    pools.append(np.array(LARGE) if rng.random() < 0.2 else pools[-1])
    rows = np.stack([[choice(rng, choice(rng, pools)) for _ in range(d)] for _ in range(n)])
    if rng.random() < 0.4:
        rows[rng.random(rows.shape) < 0.2] = np.nan
    return rows


def contained(rng, rows, names):
    """(name of the container, the table in it): of finite values where the container needs that."""
    kind = choice(rng, list(KINDS))
    with np.errstate(all="ignore"):
        return kind, KINDS[kind](rng, rows, names)


def _integers(rng, rows, dtype):
    info = np.iinfo(dtype)
    whole = np.clip(np.nan_to_num(np.rint(rows)), max(info.min, -(2**62)), min(info.max, 2**62)).astype(dtype)
    if rng.random() < 0.3:
        edges = np.array([info.max, info.min, info.max - 1, 0], dtype)
        whole[rng.random(whole.shape) < 0.2] = choice(rng, edges)
    return whole


def _sparse(rng, rows, make, dtype=np.float64):
    held = scipy.sparse.csr_matrix(np.where(rng.random(rows.shape) < 0.5, 0, rows).astype(dtype))
    if rng.random() < 0.3 and held.nnz:
        held.data[rng.integers(held.nnz)] = 0  # an entry that is there, and zero
    return make(held)


def _stored_twice(rng, rows, names):
    held = _sparse(rng, rows, lambda m: m, choice(rng, [np.float64, np.float32]))
    held.indices = np.zeros_like(held.indices)
    return held


def _long_indices(held):
    held.indices, held.indptr = held.indices.astype(np.int64), held.indptr.astype(np.int64)
    return held


def _nullable(rng, rows, names):
    columns = {}
    for i, name in enumerate(names):
        column = np.nan_to_num(rows[:, i], posinf=9, neginf=-9)
        dtype = choice(rng, ["Int64", "Int32", "Float64", "Float32", "boolean", "UInt8"])
        if dtype == "boolean":
            column = column > 0
        elif dtype.startswith(("I", "U")):
            column = _integers(rng, column, dtype.lower())
        holes = rng.random(len(rows)) < 0.2
        columns[name] = pd.array(np.where(holes, 0, column).astype(dtype.lower().removesuffix("ean")), dtype=dtype)
        columns[name][holes] = pd.NA
    return pd.DataFrame(columns)


def _mixed(rng, rows, names):
    dtypes = ["float64", "float32", "int64", "int16", "bool", "uint64", "float16"]
    columns = {}
    for i, name in enumerate(names):
        dtype = np.dtype(choice(rng, dtypes))
        columns[name] = _integers(rng, rows[:, i], dtype) if dtype.kind in "iu" else rows[:, i].astype(dtype)
    return pd.DataFrame(columns)


def _frame(rng, rows, names):
    return pd.DataFrame(rows, columns=names)


def _other_names(rng, rows, names):
    frame = _frame(rng, rows, names)
    change = rng.integers(6)
    if change == 0:
        return frame[list(rng.permutation(names))]
    if change == 1:
        return frame.rename(columns={names[0]: "other"})
    if change == 2:
        return frame.assign(more=1.0)
    if change == 3:
        return frame[names[:-1]]
    if change == 4:
        return frame.set_axis([names[0]] * len(names), axis=1)
    return frame.set_axis(range(len(names)), axis=1)


def _bad_columns(rng, rows, names):
    frame = _frame(rng, rows, names)
    column = choice(
        rng,
        [
            pd.date_range("2020-01-01", periods=len(rows)).to_numpy(),
            pd.Categorical(rng.integers(0, 3, len(rows))),
            np.array(["text"] * len(rows), object),
            np.full(len(rows), pd.NA, object),
            pd.array(["text"] * len(rows), dtype="string"),
            pd.timedelta_range("1D", periods=len(rows)).to_numpy(),
            np.full(len(rows), 1j),
        ],
    )
    return frame.assign(**{names[-1]: column})


def _arrow(rng, rows, names):
    """Columns that Arrow holds, as ``pd.read_parquet(dtype_backend="pyarrow")`` gives them."""
    return _nullable(rng, rows, names).convert_dtypes(dtype_backend="pyarrow")


def _unsorted(rng, rows, names):
    held = _sparse(rng, rows, lambda m: m)
    for start, stop in zip(held.indptr[:-1], held.indptr[1:], strict=True):
        order = start + rng.permutation(stop - start)
        held.indices[start:stop], held.data[start:stop] = held.indices[order], held.data[order]
    held.has_sorted_indices = False
    return held


def _categories(rng, rows, names):
    """Numbers among which one column is of numeric categories."""
    frame = _frame(rng, rows, names)
    column = choice(rng, list(names))
    whole = np.clip(np.nan_to_num(frame[column]), -3, 3).round()
    return frame.assign(**{column: pd.Categorical(whole, ordered=bool(rng.integers(2)))})


def _objects(rng, rows, names):
    """Numbers of Python, of NumPy, as text, and none, in one array or in the columns of a frame."""
    kinds = [float, np.float32, lambda v: fractions.Fraction(v) if np.isfinite(v) else v, np.float64]
    kinds += [lambda v: decimal.Decimal(float(v)), lambda v: None if np.isnan(v) else v]
    kinds += [str] * (rng.random() < 0.2)
    held = np.array([[choice(rng, kinds)(value) for value in row] for row in rows], object).reshape(rows.shape)
    return held if rng.random() < 0.5 else pd.DataFrame(held, columns=list(names))


def _named_otherwise(rng, rows, names):
    """Frames whose columns or rows have names of several levels, of other types, or twice."""
    frame = _frame(rng, rows, names)
    change = rng.integers(5)
    if change == 0:
        frame.columns = pd.MultiIndex.from_tuples([("a", name) for name in names])
    elif change == 1:
        frame.columns = pd.CategoricalIndex(names)
    elif change == 2:
        frame.columns = [float(i) for i in range(len(names))]
    elif change == 3:
        frame.index = [0] * len(frame)
    else:
        frame.columns = pd.Index(names, name="features")
    return frame


def _mapped(rng, rows, names):
    """An array in a file."""
    with tempfile.TemporaryFile() as file:
        held = np.memmap(file, dtype=rows.dtype, shape=rows.shape, mode="w+")
    held[:] = rows
    return held


def _bad_arrays(rng, rows, names):
    bad = [rows.astype(complex), rows.astype(str), rows[0], rows[None], rows[:, :-1], np.repeat(rows, 2, 1), rows[:0]]
    return choice(rng, [*bad, rows.astype("M8[s]"), "text", None, 1.0, pd.Series(rows[0]), {"a": rows}])


KINDS = {
    "float64": lambda rng, rows, names: rows,
    "float32": lambda rng, rows, names: rows.astype(np.float32),
    "fortran": lambda rng, rows, names: np.asfortranarray(rows),
    "strides": lambda rng, rows, names: np.repeat(np.repeat(rows, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda rng, rows, names: rows[::-1, ::-1],
    "swapped bytes": lambda rng, rows, names: rows.astype(choice(rng, [">f8", ">f4", ">i4"])),
    "float16": lambda rng, rows, names: rows.astype(np.float16),
    "longdouble": lambda rng, rows, names: rows.astype(np.longdouble),
    "integers": lambda rng, rows, names: _integers(rng, rows, choice(rng, ["i1", "u1", "i2", "i4", "u4", "i8", "u8"])),
    "bool": lambda rng, rows, names: rows > 0,
    "object": lambda rng, rows, names: np.where(np.isnan(rows), None, rows.astype(object)),
    "list": lambda rng, rows, names: choice(rng, [rows, np.nan_to_num(rows).clip(-9e9, 9e9).astype(int)]).tolist(),
    "tuple": lambda rng, rows, names: tuple(rows),
    "masked": lambda rng, rows, names: np.ma.array(rows, mask=rng.random(rows.shape) < 0.2),
    "tensor": lambda rng, rows, names: torch.from_numpy(rows),
    "frame": _frame,
    "frame of other dtypes": _mixed,
    "frame with pd.NA": _nullable,
    "frame of other names": _other_names,
    "frame of other columns": _bad_columns,
    "sparse frame": lambda rng, rows, names: _frame(rng, rows, names).astype(pd.SparseDtype("float64", 0.0)),
    **({"frame of Arrow": _arrow} if importlib.util.find_spec("pyarrow") else {}),
    "frame with categories": _categories,
    "frame of other indices": _named_otherwise,
    "objects": _objects,
    "matrix": lambda rng, rows, names: np.matrix(rows),
    "mapped": _mapped,
    "read-only": lambda rng, rows, names: np.frombuffer(rows.tobytes()).reshape(rows.shape),
    "records": lambda rng, rows, names: _frame(rng, rows, names).to_records(index=False),
    "tensor that requires grad": lambda rng, rows, names: torch.from_numpy(rows).requires_grad_(),
    "list of arrays": lambda rng, rows, names: list(rows.astype(choice(rng, [np.float32, np.float64]))),
    "list of lists with none": lambda rng, rows, names: np.where(np.isnan(rows), None, rows.astype(object)).tolist(),
    "csr": lambda rng, rows, names: _sparse(rng, rows, lambda m: m, choice(rng, [np.float64, np.float32])),
    "csr_array": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.csr_array),
    "csr of integers": lambda rng, rows, names: _sparse(rng, _integers(rng, rows, "i4"), lambda m: m, np.int64),
    "csr stored twice": _stored_twice,
    "csc": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.csc_matrix),
    "coo": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.coo_matrix),
    "csr of unsorted indices": _unsorted,
    "csr of long indices": lambda rng, rows, names: _sparse(rng, rows, _long_indices),
    "csr of booleans": lambda rng, rows, names: scipy.sparse.csr_matrix(rows > 0),
    "bsr": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.bsr_matrix),
    "dok": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.dok_matrix),
    "dia": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.dia_matrix),
    "csc_array": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.csc_array),
    "lil": lambda rng, rows, names: _sparse(rng, rows, scipy.sparse.lil_matrix),
    "no table": _bad_arrays,
}
