"""A view of a copy is read from where the copy came from: the same elements in the same order."""

import types

import pytest
import torch

from fastens.plan.lowering.origin import origin
from fastens.plan.lowering.values import Apply, Expression, Leaf
from fastens.program.steps import Opcode
from fastens.trace.record import Recording


def elements(storage, offset, dims):
    """The elements that an origin names, one after the other as the view has them."""
    at = torch.tensor([offset])
    for factors in dims:
        positions = torch.zeros(1, dtype=torch.int64)
        for size, stride in factors:  # innermost first
            positions = (torch.arange(size)[:, None] * stride + positions).flatten()
        at = (at[:, None] + positions).flatten()
    return storage[at]


def follow(*tensors, number=None):
    """Origin of the last of a chain: source, view of it, copy, view of the copy, copy, ... view."""
    recording = Recording()
    values = {}
    views, copies = tensors[1::2], tensors[2::2]
    for view, copy in zip(views, copies, strict=False):
        leaf, ref = Leaf(recording.ref(view)), recording.ref(copy)
        root = leaf if number is None else Apply(Opcode.MULTIPLY_NUMBER, (leaf,), number)
        values[ref.storage] = Expression(ref, root)
    found = origin(types.SimpleNamespace(values=values), recording.ref(views[-1]), number is not None)  # pyright: ignore
    return found, recording


SOURCE = torch.arange(2.0 * 24 * 4 * 6).reshape(2, 4, 6, 24).permute(0, 3, 1, 2)  # channels last


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y,
        lambda y: y.reshape(2, 24, 24),
        lambda y: y.reshape(4, 12, 24).transpose(1, 2),
        lambda y: y.reshape(4, 12, 24)[:, 4:8],
        lambda y: y.reshape(4, 4, 3, 24).unbind(2)[1],
        lambda y: y[:, ::2, 1:, 2:5],
        lambda y: y.reshape(2, 2, 12, 4, 6).transpose(2, 3),
        lambda y: y[1:, 5],
        lambda y: y.reshape(2, 24, 12, 2)[..., 1],
        lambda y: y.expand(2, 24, 4, 6)[:, :1].expand(2, 3, 4, 6),
    ],
)
def test_views_of_a_contiguous_copy(view):
    copy = SOURCE.contiguous()
    found, recording = follow(SOURCE, SOURCE, copy, view(copy))
    if found.ref.storage != recording.ref(SOURCE).storage:  # not followed: then the view is read as it is
        found_in = copy
        assert view(copy).stride()[1] == 0
    else:
        found_in = SOURCE
    flat = torch.as_strided(found_in, (found_in.numel(),), (1,))
    assert torch.equal(elements(flat, found.ref.offset, found.dims), view(copy).flatten())


def test_a_chain_of_copies_and_factors():
    first = SOURCE.reshape(4, 12, 24)  # a copy
    view = first[:, 4:8].transpose(1, 2)
    second = view.contiguous() * 0.5
    base = SOURCE.contiguous()
    found, recording = follow(
        SOURCE,
        SOURCE,
        base,
        base.reshape(4, 12, 24)[:, 4:8].transpose(1, 2),
        second,
        second.transpose(1, 2),
        number=0.5,
    )
    assert found.scale == 0.25  # once for every copy
    assert found.ref.storage == recording.ref(SOURCE).storage
    flat = torch.as_strided(SOURCE, (SOURCE.numel(),), (1,))
    assert torch.equal(elements(flat, found.ref.offset, found.dims), view.transpose(1, 2).flatten())


def test_a_view_across_what_the_source_keeps_apart_is_several_factors():
    copy = SOURCE.contiguous()
    found, _ = follow(SOURCE, SOURCE, copy, copy.reshape(2, 24 * 24))
    assert found.dims[1] == [(24, 24), (24, 1)]
    assert found.simple() is None
    same, _ = follow(SOURCE, SOURCE, copy, copy.flatten(2))
    assert same.simple().stride == (576, 1, 24)
