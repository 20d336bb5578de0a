"""What Python asks of a tensor beside its values, and the questions that have no one answer."""

from typing import Any

import torch
from torch import Tensor

from fastens.fold.dispatch import READS, Fold, rule
from fastens.fold.names import named
from fastens.fold.nested import leaves_of, plain
from fastens.fold.reads import SHAPED_BY_VALUES, SIZED_BY_VALUES
from fastens.fold.tensor import MemberTensor, NotFoldable, getters, member_valued
from fastens.fold.writes import check_written, writes_to

_ATTRIBUTES = """
    device dtype is_cpu is_cuda is_meta is_mkldnn is_mps is_nested is_quantized is_sparse is_sparse_csr
    is_vulkan is_xla is_xpu itemsize layout name names nbytes ndim requires_grad retains_grad shape
    _version output_nr is_ipu is_maia is_mtia volatile
"""
_METHODS = """
    size dim ndimension numel nelement element_size is_floating_point is_complex is_contiguous is_signed stride
    storage_offset get_device is_tensor is_storage is_inference is_conj is_neg is_same_size is_set_to has_names
    is_pinned is_shared is_coalesced dim_order result_type can_cast __len__ __hash__
    is_nonzero_ broadcast_tensors_shape _is_zerotensor
"""
_READS = """
    item tolist numpy __bool__ __float__ __int__ __index__ __complex__ __array__ is_nonzero equal allclose __contains__
    data_ptr untyped_storage storage _typed_storage __iter_values__ __dlpack__ to_dlpack __reduce_ex__ share_memory_
    __repr__ __format__ register_hook backward retain_grad set_ resize_ resize_as_ as_subclass pin_memory _make_subclass
"""
READS.update(named(_READS))
SHAPED_BY_VALUES.update(
    named("tensor_split _pack_padded_sequence _pad_packed_sequence gru lstm rnn_tanh rnn_relu ctc_loss")
)


def _is_masked(args: Any, kwargs: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in leaves_of(args[1:]))


def _is_repeated(args: Any, kwargs: Any) -> bool:
    repeats = kwargs.get("repeats", *args[1:2])
    return repeats is None or isinstance(repeats, Tensor)


_SIZED = {
    "nonzero argwhere unique unique_consecutive unique_dim _unique2 masked_select bincount": lambda args, kwargs: True,
    "where": lambda args, kwargs: len(args) + len(kwargs) == 1,
    "__getitem__ index": _is_masked,
    "repeat_interleave": _is_repeated,
}
for names, sized in _SIZED.items():
    SIZED_BY_VALUES.update(dict.fromkeys(named(names), sized))
METADATA: set[Any] = set()  # functions that tell nothing of a tensor's values


METADATA.update(named(_METHODS), getters(_ATTRIBUTES))


@rule(*METADATA)
def metadata(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """The answer of one member, which is that of all."""

    def one(x: Any) -> Any:
        if not member_valued(x):
            return plain(x)
        stack = fold.stack(x)
        return stack[0] if len(stack) else stack.new_empty(stack.shape[1:])

    return func(*map(one, args), **kwargs)


(_IS_LEAF,) = getters("is_leaf")


@rule(*getters("grad_fn is_leaf"))
def of_the_stack(fold: Fold, func: Any, x: MemberTensor) -> Any:
    """Where the derivatives of the stack come from; a weight is a leaf, also where a pass has a part of it."""
    if isinstance(x, torch.nn.Parameter):
        return True if func == _IS_LEAF else None
    return func(fold.stack(x))


@rule(*named("_is_view"), *getters("_base"))
def of_memory(fold: Fold, func: Any, x: MemberTensor) -> Any:
    """Whose memory a stack is in says nothing of a member's."""
    raise NotFoldable("the network asks of which tensor another is a view")


@rule(*getters("data"))
def data(fold: Fold, func: Any, x: MemberTensor) -> MemberTensor:
    """The stack without its derivatives, in the same memory."""
    return fold.wrap(fold.stack(x).data, fold.aliases(x))


@rule(*(getattr(Tensor, name).__set__ for name in ("data", "grad")))
def set_data(fold: Fold, func: Any, x: Any, value: Any) -> None:
    """Replace what the stack holds."""
    if not writes_to(func, (x, value)):
        return
    check_written(fold, x)
    if not member_valued(x):
        raise NotFoldable("a tensor that is the same for all members takes member-valued data")
    if not fold.aliases(x):
        raise NotFoldable("a tensor of which this pass has some members or rows takes other data")
    value = fold.entries(value) if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value.is_inference():  # the stack outlives inference mode
        with torch.inference_mode(False):
            value = value.clone()
    func(fold.stack(x), value)
    x.flat = None


@rule(*getters("grad"))
def grad(fold: Fold, func: Any, x: MemberTensor) -> MemberTensor | None:
    """The gradient of the stack."""
    found = fold.stack(x).grad
    return None if found is None else fold.wrap(found)


@rule(torch.autograd.grad)
def autograd_grad(
    fold: Fold, func: Any, outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Derivatives inside a network, as of an energy: of all members at once, or one by one of a common input."""
    outs, ins = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
    seeds = [None] * len(outs) if grad_outputs is None else grad_outputs
    seeds = [seeds] if isinstance(seeds, Tensor) else list(seeds)
    seeds = [
        None
        if seed is None and x.numel() != 1
        else torch.ones_like(fold.entries(x))
        if seed is None
        else fold.entries(seed)
        for x, seed in zip(outs, seeds, strict=True)
    ]
    batched = kwargs.get("is_grads_batched", False)  # several seeds at once, [N, G, ...]
    with torch.enable_grad():  # parts of the outputs belong to the graph, wherever it is differentiated
        outs = [fold.entries(x) for x in outs]
        parts = [[x[n] for x in outs] for n in range(fold.hidden.size)]
    apart = [x for x in ins if _is_apart(fold, x)]
    rest = [x for x in ins if not _is_apart(fold, x)]
    kwargs["retain_graph"] = True if rest else kwargs.get("retain_graph")
    in_front = [seed.movedim(1, 0) if batched and seed is not None else seed for seed in seeds]
    whole = func(outs, [_bare(x) for x in apart], in_front, *args, **kwargs) if apart else ()
    whole = [g.movedim(1, 0) if batched and g is not None else g for g in whole]
    columns: list[list[Any]] = []
    for n, part in enumerate(parts if rest else ()):
        own = [None if seed is None else seed[n] for seed in seeds]
        by_rest = func(part, [_bare(x) for x in rest], own, *args, **kwargs)
        columns.append([None if g is None else _of_entry(fold, g, x, n) for g, x in zip(by_rest, rest, strict=True)])
    at_once = iter([None if g is None else _of_entries(fold, g, x) for g, x in zip(whole, apart, strict=True)])
    one_by_one = iter([None if c[0] is None else torch.stack(c) for c in zip(*columns, strict=True)])
    found = [next(at_once if _is_apart(fold, x) else one_by_one) for x in ins]
    return tuple(None if g is None else fold.wrap(g) for g in found)


def _is_apart(fold: Fold, x: Any) -> bool:
    """Whether derivatives by a tensor are each entry's own: not by a common one, or by weights of several rows."""
    return member_valued(x) and (x.hidden is fold.hidden or fold.hidden.row_members is None)


def _bare(x: Any) -> Tensor:
    """What a wrapper stands for: of a weight the whole stack, to which the graph leads."""
    return x.stack if isinstance(x, MemberTensor) else x


def _of_entries(fold: Fold, gradient: Tensor, x: Any) -> Tensor:
    return fold.entries(MemberTensor(gradient, x.hidden))


def _of_entry(fold: Fold, gradient: Tensor, x: Any, n: int) -> Tensor:
    """The derivative of entry n by a tensor, of a weight by that of its member."""
    return _of_entries(fold, gradient, x)[n] if member_valued(x) else gradient
