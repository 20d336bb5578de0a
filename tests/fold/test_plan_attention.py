"""Attention that networks write as two products with a softmax between them is one step of a plan."""

import math

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from tests.networks import randomised
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
CHANNELS, SIZE = 16, 4


def edm(x, heads):
    """Channels of a head, then query, key and value; the key is scaled."""
    q, k, v = x.reshape(x.shape[0] * heads, CHANNELS // heads, 3, -1).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float()).softmax(dim=2).to(q.dtype)
    return torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape[0], CHANNELS, SIZE, SIZE)


def guided_diffusion(x, heads):
    """Heads outside of query, key and value, over images in one line; query and key are scaled."""
    width = CHANNELS // heads
    q, k, v = x.flatten(2).reshape(x.shape[0] * heads, 3 * width, -1).split(width, dim=1)
    scale = width**-0.25
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1).type(q.dtype)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(x.shape[0], CHANNELS, SIZE, SIZE)


def guided_diffusion_new_order(x, heads):
    """Heads inside of query, key and value."""
    q, k, v = x.flatten(2).contiguous().chunk(3, dim=1)
    shape = (x.shape[0] * heads, CHANNELS // heads, -1)
    scale = shape[1] ** -0.25
    weights = torch.softmax(torch.einsum("bct,bcs->bts", (q * scale).view(shape), (k * scale).view(shape)), dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v.reshape(shape)).reshape(x.shape[0], CHANNELS, SIZE, SIZE)


def tokens(x, heads):
    """Query, key and value [rows, heads, tokens, width]."""
    parts = x.flatten(2).transpose(1, 2).chunk(3, dim=-1)
    return [part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in parts]


def image(x):
    """[rows, heads, tokens, width] as images."""
    return x.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape[0], CHANNELS, SIZE, SIZE)


def baddbmm(x, heads):
    """As attention processors of diffusers without torch's attention."""
    q, k, v = (part.flatten(0, 1) for part in tokens(x, heads))
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(nothing, q, k.transpose(-1, -2), beta=0, alpha=q.shape[-1] ** -0.5)
    return image(torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (-1, heads)))


def matmul(x, heads):
    """In four dimensions."""
    q, k, v = tokens(x, heads)
    return image((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


def score_sde(x, heads):
    """Over both dimensions of an image, one head."""
    q, k, v = x.chunk(3, dim=1)
    scores = torch.einsum("bchw,bcij->bhwij", q, k) * CHANNELS**-0.5
    weights = scores.flatten(3).softmax(-1).unflatten(3, (SIZE, SIZE))
    return torch.einsum("bhwij,bcij->bchw", weights, v)


def latent_diffusion(x, heads):
    """The weights transposed, behind the values; one head."""
    q, k, v = (part.flatten(2) for part in x.chunk(3, dim=1))
    weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * CHANNELS**-0.5, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1)).reshape(x.shape[0], CHANNELS, SIZE, SIZE)


def masked(x, heads):
    q, k, v = tokens(x, heads)
    return image((q @ k.transpose(-1, -2) + torch.ones(SIZE**2, SIZE**2).tril()).softmax(-1) @ v)


def over_the_queries(x, heads):
    q, k, v = tokens(x, heads)
    return image((q @ k.transpose(-1, -2)).softmax(-2) @ v)


def weights_used_twice(x, heads):
    q, k, v = tokens(x, heads)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return image(weights @ v) + weights.amax((1, 2, 3))[:, None, None, None]


def scores_used_twice(x, heads):
    q, k, v = tokens(x, heads)
    scores = q @ k.transpose(-1, -2)
    return image((scores * 0.5).softmax(-1) @ v) + scores.mean((1, 2, 3))[:, None, None, None]


def without_softmax(x, heads):
    q, k, v = tokens(x, heads)
    return image(q @ k.transpose(-1, -2) @ v)


class Network(nn.Module):
    """A residual attention block as U-Nets have it."""

    def __init__(self, attend, heads):
        super().__init__()
        self.attend, self.heads = attend, heads
        self.inner, self.norm = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.GroupNorm(4, CHANNELS)
        self.qkv, self.proj = nn.Conv2d(CHANNELS, 3 * CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.outer = nn.Conv2d(CHANNELS, 3, 3, padding=1)

    def forward(self, x):
        h = self.inner(x)
        h = self.proj(self.attend(self.qkv(self.norm(h)), self.heads)) + h
        return self.outer(h)


def run(attend, heads, dtype=torch.float32, batch=2):
    """Error of a planned ensemble, and its plan."""
    members = [randomised(lambda: Network(attend, heads), seed).to(dtype) for seed in range(3)]
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    ensemble = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        for factor in (1.0, -0.7):
            expected = torch.stack([member.float()(factor * x.float()) for member in members])
            for member in members:
                member.to(dtype)
            error = relative_error(ensemble.member_outputs(factor * x).float(), expected)
            assert error < (NETWORK[torch.float32] if dtype == torch.float32 else 3e-2)
    (plan,) = ensemble.report().plans
    return plan


FORMS = [(form, heads) for form in (edm, guided_diffusion, guided_diffusion_new_order) for heads in (1, 2)]
FORMS += [(form, heads) for form in (baddbmm, matmul) for heads in (1, 4)]
FORMS += [(score_sde, 1), (latent_diffusion, 1)]
IDS = [f"{form.__name__}-{heads}" for form, heads in FORMS]


@pytest.mark.parametrize(("form", "heads"), FORMS, ids=IDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_is_one_step(form, heads, batch):
    plan = run(form, heads, batch=batch)
    assert plan["Attention"] == 1
    assert not [kind for kind in plan if kind.startswith("aten.")]


@pytest.mark.parametrize(("form", "heads"), [(edm, 1), (guided_diffusion, 2), (baddbmm, 4), (score_sde, 1)])
def test_in_bfloat16(form, heads):
    assert run(form, heads, torch.bfloat16)["Attention"] == 1


@pytest.mark.parametrize(("form", "heads"), [(edm, 1), (edm, 2), (baddbmm, 4), (score_sde, 1), (latent_diffusion, 1)])
def test_reads_and_writes_where_the_convolutions_do(form, heads):
    """No copies of queries, keys, values or of the result: no more than the network has without attention."""
    without = run(lambda x, _: x[:, :CHANNELS], 1)
    assert run(form, heads)["Pointwise"] == without["Pointwise"]


@pytest.mark.parametrize("form", [masked, over_the_queries, without_softmax])
def test_what_is_no_attention_is_left_to_torch(form):
    plan = run(form, 2)
    assert plan["Attention"] == 0
    assert plan["aten.bmm.default"] == 2


@pytest.mark.parametrize("form", [weights_used_twice, scores_used_twice])
def test_what_somebody_else_reads_is_computed(form):
    plan = run(form, 2)
    assert plan["Attention"] == 1
    assert plan["aten.bmm.default"] == 1


class GroupedHeads(nn.Module):
    """As ACE-Step: fewer keys and values than queries, each read by a group of heads."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (part.unflatten(-1, (1, 4)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def test_groups_of_heads_read_their_own_keys():
    members = [randomised(GroupedHeads, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    for seed in range(2):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = torch.stack([member(x) for member in members]).mean(0)
            assert relative_error(ensemble(x), expected) < NETWORK[torch.float32]
    assert ensemble.report().plans, ensemble.report().why_no_plan
