"""Members in an ensemble: handed out as copies, replaced, placed, and warned of where all are one."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

import fastens
from tests.networks import mlp, randomised, small_unet


def small(seed):
    return randomised(mlp, seed)


def call(ens, x):
    with torch.no_grad():
        return ens(x)


@pytest.fixture
def x():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["fold", "loop"])
def ens(request):
    return fastens.Ensemble([small(k) for k in range(3)], "sum", engine=request.param)


def test_a_member_is_a_copy(ens, x):
    before = call(ens, x)
    with torch.no_grad():
        for p in ens.members[1].parameters():
            p.zero_()
    assert torch.equal(call(ens, x), before)
    assert "copy" in type(ens).members.__doc__


@pytest.mark.parametrize("k", [0, 2, -1])
@pytest.mark.parametrize("as_state", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_a_member_is_replaced(ens, x, k, as_state, called):
    if called:
        call(ens, x), call(ens, x)
    new = small(7)
    kept = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    ens.replace_member(k, new.state_dict() if as_state else new)
    members = [small(j) for j in range(3)]
    members[k] = small(7)
    for _ in range(2):
        torch.testing.assert_close(call(ens, x), torch.stack([m(x) for m in members]).sum(0).detach())
    with torch.no_grad():
        new[0].weight.zero_()  # the ensemble has copies
    torch.testing.assert_close(ens.members[k].state_dict(), kept, rtol=0, atol=0)
    assert ens.engine in ("fold", "loop")
    assert ens.verify(x) < 1e-6


def test_a_module_in_another_mode_takes_the_ensembles(ens, x):
    ens.replace_member(1, small(7).train())
    assert not any(module.training for module in ens.modules())
    torch.testing.assert_close(ens.members[1](x), small(7)(x))


def test_tensors_that_all_shared_are_shared_no_more():
    def network(seed, scale):
        made = nn.Sequential(nn.BatchNorm1d(5), small(seed), nn.Linear(5, 5)).eval()
        made[2].weight.requires_grad_(False).fill_(scale)
        made[2].bias.requires_grad_(False).fill_(0.5)
        made[2].register_buffer("table", torch.full((3,), scale))
        return made

    members = [network(k, 1.0) for k in range(3)]
    ens, x = fastens.Ensemble(members), torch.randn(4, 5)
    assert {"2.weight", "2.bias", "2.table"} <= ens._engine.shared
    members[1] = network(5, 2.0)
    ens.replace_member(1, members[1])
    assert "2.bias" in ens._engine.shared
    assert "2.weight" not in ens._engine.shared
    for _ in range(2):
        torch.testing.assert_close(call(ens, x), torch.stack([m(x) for m in members]).mean(0).detach())
    assert ens.members[1][2].table.tolist() == [2.0] * 3
    assert ens.members[0][2].table.tolist() == [1.0] * 3


def test_tied_tensors_stay_tied():
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.a = randomised(lambda: nn.Linear(5, 5), seed)
            self.b = nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    members = [Tied(0), Tied(0)]
    for trained in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ens = fastens.Ensemble([m.requires_grad_(trained).eval() for m in members])
        new, x = Tied(4).requires_grad_(trained).eval(), torch.randn(2, 5)
        ens.replace_member(1, new)
        torch.testing.assert_close(call(ens, x), ((members[0](x) + new(x)) / 2).detach())
        torch.testing.assert_close(call(ens.with_rule("sum"), x), (members[0](x) + new(x)).detach())
        member = ens.members[1]
        assert member.a.weight is member.b.weight


@pytest.mark.parametrize("alike", [True, False])
def test_a_member_of_another_dtype_is_refused(alike, x):
    ens = fastens.Ensemble([small(0), small(1) if alike else nn.Sequential(nn.Linear(5, 5))], engine="loop")
    expected = ens(x)
    with pytest.raises(ValueError, match=r"member 1: .* is torch.float64, but torch.float32 in the ensemble; convert"):
        ens.replace_member(1, ens.members[1].double())
    assert torch.equal(ens(x), expected)


def test_members_of_their_own_structures_are_replaced(x):
    ens = fastens.Ensemble([nn.Sequential(nn.Linear(5, 5)).eval(), nn.Linear(5, 5).eval()], engine="loop")
    new = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).train()
    ens.replace_member(0, new)
    expected = (new(x) + ens.members[1](x)) / 2
    torch.testing.assert_close(call(ens, x), expected.detach())
    assert new.training
    assert not ens.members[0].training


@pytest.mark.parametrize(
    ("k", "member", "error", "message"),
    [
        (3, lambda: small(0), IndexError, "member 3 of 3"),
        (0, lambda: 1.0, TypeError, "expected a torch.nn.Module or a state_dict"),
        (0, lambda: nn.Linear(5, 5), ValueError, r"differ at 0: present in one.*members\[0\] = member"),
        (0, lambda: small(0).double(), ValueError, r"member 0: .* is torch.float64, but torch.float32 in the ensemble"),
        (1, lambda: nn.Linear(5, 5).state_dict(), ValueError, "does not fit member 1.*Missing key"),
    ],
)
def test_what_does_not_fit_changes_nothing(k, member, error, message, x):
    ens = fastens.Ensemble([small(k) for k in range(3)])
    before = call(ens, x)
    with pytest.raises(error, match=message):
        ens.replace_member(k, member())
    assert torch.equal(call(ens, x), before)


def pruned(seed):
    net = small(seed)
    prune.l1_unstructured(net[0], "weight", amount=0.3)
    return net


def weight_normed(seed):
    net = small(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
    return net


def spectrally_normed(seed):
    net = small(seed)
    torch.manual_seed(seed)
    nn.utils.spectral_norm(net[0])
    return net


def lazy(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 5))


@pytest.mark.parametrize("make", [pruned, weight_normed, spectrally_normed, lazy])
def test_members_that_python_cannot_copy_at_once_stay_as_they_are(make, x):
    members = [make(k) for k in range(2)]

    def tensors():
        return [None if is_lazy(p) else p.detach().clone() for m in members for p in (*m.parameters(), *m.buffers())]

    before = tensors()
    with pytest.warns(UserWarning, match="one by one"):
        ens = fastens.Ensemble(members)
    ens.double()
    ens(x.double()).sum().backward()
    with torch.no_grad():
        for p in ens.parameters():
            p.zero_()
    for a, b in zip(tensors(), before, strict=True):
        assert a is b or (a.dtype == b.dtype and torch.equal(a, b))
    assert not any(p.grad is not None for m in members for p in m.parameters() if not is_lazy(p))


def test_lazy_members_are_named_with_the_remedy(x):
    members = [lazy(k) for k in range(2)]
    with pytest.raises(ValueError, match=r"0\.weight has no shape .* call each member once"):
        fastens.Ensemble(members, engine="fold")
    for member in members:
        member(x)
    assert fastens.Ensemble(members, engine="fold").verify(x) < 1e-6


def of_one_object():
    table = nn.Linear(5, 5)
    members = [nn.Sequential(table, small(k)) for k in range(3)]
    return fastens.Ensemble(members)


def put_in():
    ens = fastens.Ensemble([nn.Sequential(nn.Linear(5, 5), small(k)) for k in range(3)])
    ens.network[0] = nn.Linear(5, 5)
    return ens


@pytest.mark.parametrize("as_state", [False, True])
@pytest.mark.parametrize("make", [of_one_object, put_in])
def test_a_tensor_that_is_one_object_in_all_members_is_not_silently_kept(make, as_state, x):
    ens = make()
    before = call(ens, x)
    new = ens.members[1]
    with torch.no_grad():
        new[1][0].weight.mul_(2)
    ens.replace_member(1, new)  # what all of them have is as it was
    assert not torch.equal(call(ens, x), before)
    before = call(ens, x)
    with torch.no_grad():
        new[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"0\.weight is another one .* one object .* fastens\.Ensemble\(members\)"):
        ens.replace_member(1, new.state_dict() if as_state else new)
    assert torch.equal(call(ens, x), before)


def test_masks_have_one_set_of_weights():
    ens = fastens.MCDropout(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), 3)
    with pytest.raises(ValueError, match="dropout masks on one set of weights"):
        ens.replace_member(0, nn.Linear(5, 5))


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_stacks_are_made_where_and_in_what_was_asked_for(engine, x):
    members = [small(0), small(1).double(), small(2)]
    ens = fastens.Ensemble(members, engine=engine, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in ens.parameters()} == {torch.float64}
    expected = torch.stack([m.double()(x.double()) for m in members]).mean(0)
    torch.testing.assert_close(call(ens, x.double()), expected.detach())
    assert fastens.Ensemble(members, engine=engine, device="meta").device.type == "meta"


def test_integers_keep_their_dtype():
    members = [nn.BatchNorm1d(5).eval() for _ in range(2)]
    members[1].weight.data.fill_(2.0)
    ens = fastens.Ensemble(members, dtype=torch.bfloat16)
    assert ens.network._buffers["num_batches_tracked"].dtype == torch.int64
    assert ens.dtype == torch.bfloat16


def test_members_of_different_structure_are_placed_too():
    ens = fastens.Ensemble([nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5))], engine="loop", dtype=torch.float64)
    assert {p.dtype for p in ens.parameters()} == {torch.float64}


def test_masks_are_placed_too():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))
    ens = fastens.MCDropout(model, 3, dtype=torch.bfloat16, device="meta")
    assert (ens.dtype, ens.device.type) == (torch.bfloat16, "meta")
    assert model[0].weight.dtype == torch.float32


def test_loaded_members_are_placed(tmp_path):
    for k in range(2):
        randomised(small_unet, k).save_pretrained(tmp_path / str(k))
    paths = [tmp_path / "0", tmp_path / "1"]
    loaded = fastens.load_members(paths, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in loaded[1].parameters()} == {(torch.bfloat16, "meta")}
    ens = fastens.Ensemble(paths, dtype=torch.bfloat16)
    assert ens.dtype == torch.bfloat16
    ens.save_pretrained(tmp_path / "ens")
    assert fastens.Ensemble.from_pretrained(tmp_path / "ens", device="meta").device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.int64, "float32"])
def test_a_dtype_that_is_none_is_named(dtype):
    with pytest.raises(TypeError, match="expected a floating-point dtype of torch"):
        fastens.Ensemble([small(0)], dtype=dtype)


def test_without_a_dtype_members_must_agree_and_the_remedy_is_named():
    with pytest.raises(ValueError, match="or say dtype="):
        fastens.Ensemble([small(0), small(1).double()])


@pytest.mark.parametrize("same", [lambda: [small(0)] * 3, lambda: [small(0) for _ in range(3)]])
def test_members_that_are_all_one_are_warned_of(same):
    with pytest.warns(UserWarning, match="all 3 members hold the same weights"):
        fastens.Ensemble(same())


@pytest.mark.parametrize(
    "members", [lambda: [small(0)], lambda: [small(0), small(0), small(1)], lambda: [nn.Tanh()] * 2]
)
def test_others_are_not(members):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastens.Ensemble(members())


@pytest.mark.parametrize("apart", [False, True], ids=["alike", "of their own structures"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_of_members_are_warned_of(register, apart):
    members = [nn.Sequential(*[nn.Linear(3, 3) for _ in range(1 + apart * k)]) for k in range(2)]
    handle = getattr(members[1][0].weight, register)(lambda x: None)
    with pytest.warns(UserWarning, match=r"gradient of 0\.weight of member 1 .* register them on"):
        fastens.Ensemble(members, engine="loop")
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastens.Ensemble(members, engine="loop")
