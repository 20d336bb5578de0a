import pytest
import torch

from fastens.distributed.shares import checksum
from fastens.raw import raw

ONE = torch.tensor([1.5], dtype=torch.float64)
TENSORS = {
    "one of stride 0": ONE[0].expand(1),
    "one of strides 0": ONE[0].expand(1, 1),
    "one of several": torch.arange(6.0)[2:3].as_strided((1,), (5,)),
    "none": torch.empty(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "half": torch.arange(3.0).bfloat16(),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_bytes_are_those_of_the_values(name):
    x = TENSORS[name]
    plain = torch.empty(x.shape, dtype=x.dtype).copy_(x)
    found = raw(x)
    assert found.dtype == torch.uint8
    assert torch.equal(found.view(x.dtype).reshape(x.shape), plain)
    assert checksum([x]) == checksum([plain])


def test_gradients_have_bytes():
    x, found = torch.ones(1, 1, requires_grad=True), []
    y = x * 1
    y.register_hook(lambda gradient: found.append(raw(gradient)))
    y.sum().backward()
    assert torch.equal(found[0].view(torch.float32), torch.ones(1))
