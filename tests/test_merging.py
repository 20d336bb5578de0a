"""Members merged into one network: the sum of their weights, found uniformly, greedily or by the loss's gradient."""

import pytest
import torch
from torch import nn

import fastens
from fastens.merging import merge_weights


class Net(nn.Module):
    def __init__(self, seed, width=8):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def nets(count=4):
    found = [Net(k) for k in range(count)]
    for k, net in enumerate(found):
        net.norm.running_mean.normal_(generator=torch.Generator().manual_seed(k))
        net.norm.num_batches_tracked.fill_(10 + k)
    return [net.eval() for net in found]


def summed(members, weights):
    """The definition, over state dictionaries."""
    states = [member.state_dict() for member in members]
    return {
        name: sum(w * s[name].double() for w, s in zip(weights(name), states, strict=True)).float()
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def assert_merged(found, expected):
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("of", [list, fastens.Ensemble, nn.ModuleList])
def test_uniform_is_the_mean_of_the_weights_and_members_stay(of):
    members = nets()
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in members]
    found = fastens.merge(of(members))
    assert type(found) is Net
    assert not found.training
    assert_merged(found, summed(members, lambda _: [0.25] * 4))
    with torch.no_grad():
        found.first.weight.add_(1)
    assert all(
        torch.equal(m.state_dict()[n], v) for m, state in zip(members, before, strict=True) for n, v in state.items()
    )


def test_signed_weights_and_weights_of_layers():
    members = nets(2)
    assert_merged(fastens.merge(members, [1.5, -0.5]), summed(members, lambda _: [1.5, -0.5]))
    by_name = {"": [0.5, 0.5], "first": [1, 0], "first.bias": [0, 1]}

    def of(name):
        return by_name["first.bias" if name == "first.bias" else "first" if name.startswith("first") else ""]

    assert_merged(fastens.merge(members, by_name), summed(members, of))


def test_a_member_of_weight_zero_is_not_looked_at():
    members = nets(2)
    with torch.no_grad():
        members[1].first.weight.fill_(torch.nan)
    assert torch.equal(fastens.merge(members, [1, 0]).first.weight, members[0].first.weight)
    assert fastens.merge(members).first.weight.isnan().all()


def test_half_precision_is_summed_in_float32():
    members = [net.to(torch.bfloat16) for net in nets(3)]
    found = fastens.merge(members)
    assert found.first.weight.dtype == torch.bfloat16
    exact = sum(m.first.weight.float() for m in members) / 3
    assert torch.equal(found.first.weight, exact.to(torch.bfloat16))


def test_checkpoints_are_read_one_at_a_time(tmp_path):
    members = nets(3)
    for k, member in enumerate(members):
        torch.save(member.state_dict(), tmp_path / f"step_{k}.pt")
    paths = [tmp_path / f"step_{k}.pt" for k in range(3)]
    found = fastens.merge(fastens.load_members(paths, lambda: Net(9)))
    assert_merged(found, summed(members, lambda _: [1 / 3] * 3))


def along_a_line(places, seed=0):
    """Members between two networks, as along one run."""
    ends = nets(2)
    with torch.no_grad():
        for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
            b.copy_(a + 0.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)))
    ends[1].norm.running_mean.copy_(ends[0].norm.running_mean)
    return [fastens.merge(ends, [1 - place, place]) for place in places]


def against(target, rows=64, seed=5):
    """The loss of an ensemble of candidates against what a network gives."""
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        wanted = target(x)
    return lambda ensemble: (ensemble.member_outputs(x) - wanted).square()


def losses_of(loss, networks):
    with torch.no_grad():
        return [float(loss(fastens.Ensemble([network])).mean()) for network in networks]


def test_greedy_takes_what_makes_the_loss_fall_and_no_more():
    target, low, high, far = along_a_line([0.5, 0.3, 0.7, 4.0])
    loss = against(target)
    weights = merge_weights([far, low, high], "greedy", loss)
    assert weights == {"": (0.0, 0.5, 0.5)}
    found = fastens.merge([far, low, high], "greedy", loss)
    assert losses_of(loss, [found])[0] < min(losses_of(loss, [far, low, high]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_greedy_looks_at_what_it_takes_alone(place, value):
    target, low, high, far = along_a_line([0.5, 0.3, 0.7, 4.0])
    members = [low, high]
    with torch.no_grad():
        far.first.weight.fill_(value)
    members.insert(place, far)
    assert merge_weights(members, "greedy", against(target))[""] == tuple(0.5 * (k != place) for k in range(3))
    with pytest.raises(ValueError, match="loss of every merge is not a number"):
        merge_weights(members, "fitted", against(target), steps=2)


def test_greedy_is_the_loop_over_all_additions():
    members, loss = nets(4), against(Net(8).eval())
    taken, least = [], float("inf")
    while len(taken) < 4:
        tried = {
            k: losses_of(loss, [fastens.merge([members[i] for i in (*taken, k)])])[0]
            for k in range(4)
            if k not in taken
        }
        best = min(tried, key=tried.get)
        if tried[best] >= least:
            break
        least, taken = tried[best], [*taken, best]
    assert merge_weights(members, "greedy", loss)[""] == tuple(float(k in taken) / len(taken) for k in range(4))


def test_fitted_finds_weights_beyond_the_members():
    target, first, second = along_a_line([1.4, 0.0, 1.0])
    loss = against(target)
    signed = merge_weights([first, second], "fitted", loss, penalties=[0.0], steps=200)
    assert signed[""] == pytest.approx((-0.4, 1.4), abs=0.02)
    convex = merge_weights([first, second], "fitted", loss, penalties=[0.0], steps=300, signed=False)
    assert convex[""][1] > 0.9
    assert min(convex[""]) >= 0
    assert sum(signed[""]) == pytest.approx(1)


def test_the_gradient_of_the_weights_is_that_of_differences():
    from fastens.merging import _Candidates

    members = [net.double() for net in nets(3)]
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = lambda ensemble: ensemble.member_outputs(x).square()  # noqa: E731
    weights = torch.tensor([[[0.2, 0.5], [0.5, 0.1], [0.3, 0.4]]], dtype=torch.float64)
    candidates = _Candidates(fastens.Ensemble(members), ["", "first"])

    def value(weights):
        return loss(candidates.ensemble({n: v.detach() for n, v in candidates.sums(weights).items()})).mean()

    free = weights.clone().requires_grad_()
    sums = candidates.sums(free)
    ensemble = candidates.ensemble({name: v.detach() for name, v in sums.items()})
    loss(ensemble).mean().backward()
    own = dict(ensemble.network.named_parameters())
    torch.autograd.backward([sums[n] for n in own if n in sums], [own[n].grad for n in own if n in sums])
    for k in range(3):  # the group of "first": its tensors alone, in which no statistics are
        moved = [weights.clone(), weights.clone()]
        for sign, each in zip((1, -1), moved, strict=True):
            each[0, k, 1] += sign * 1e-5
        with torch.no_grad():
            expected = (value(moved[0]) - value(moved[1])) / 2e-5
        assert float(free.grad[0, k, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_penalties_pull_to_uniform_weights_and_validation_chooses():
    target, first, second = along_a_line([1.4, 0.0, 1.0])
    loss = against(target)
    strong = merge_weights([first, second], "fitted", loss, penalties=[1e4], steps=200)
    assert strong[""] == pytest.approx((0.5, 0.5), abs=0.02)
    middle = along_a_line([0.5])[0]
    chosen = merge_weights([first, second], "fitted", loss, penalties=[0.0], validation=against(middle), steps=50)
    assert chosen[""] == (0.5, 0.5)  # other rows say that fitting did harm


def test_layers_have_weights_of_their_own():
    first, second = along_a_line([0.0, 1.0])
    target = fastens.merge([first, second], {"": [1, 0], "last": [0, 1]})
    found = merge_weights([first, second], "fitted", against(target), layers=["last"], penalties=[0.0], steps=300)
    assert found["last"][1] > 0.9
    assert found[""][0] > 0.9
    each = merge_weights([first, second], "fitted", against(target), layers="each", steps=2)
    assert set(each) == {"first", "norm", "last"}
    assert type(fastens.merge([first, second], each)) is Net


def test_bad_input():
    members, loss = nets(2), against(Net(8).eval())
    other = Net(0, width=9).eval()
    for given in ([members[0], other], fastens.Ensemble([members[0], other], engine="loop")):
        with pytest.raises(ValueError, match="different structure have no sum of weights"):
            fastens.merge(given)
    with pytest.raises(ValueError, match="different structure have no sum of weights"):
        fastens.merge([members[0], other], "greedy", loss)
    with pytest.raises(ValueError, match="dropout masks"):
        fastens.merge(fastens.MCDropout(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), 3))
    with pytest.raises(ValueError, match="sum to 2"):
        fastens.merge(members, [1.0, 1.0])
    with pytest.raises(ValueError, match="one per member"):
        fastens.merge(members, [1.0])
    with pytest.raises(ValueError, match="no tensor's name begins with 'middle'"):
        fastens.merge(members, {"": [0.5, 0.5], "middle": [1, 0]})
    with pytest.raises(ValueError, match="has no weights"):
        fastens.merge(members, {"first": [0.5, 0.5]})
    with pytest.raises(ValueError, match="expected numbers or one of"):
        fastens.merge(members, "best")
    with pytest.raises(ValueError, match="need loss="):
        fastens.merge(members, "fitted")
    with pytest.raises(ValueError, match="layers= is of 'fitted'"):
        fastens.merge(members, "greedy", loss, layers="each")
    with pytest.raises(ValueError, match="nothing to fit"):
        fastens.merge(members, [0.5, 0.5], loss)
    with pytest.raises(ValueError, match=r"expected \[2, \.\.\.\]"):
        fastens.merge(members, "greedy", lambda ens: loss(ens).mean())
    with pytest.raises(ValueError, match="has no gradient"):
        fastens.merge(members, "fitted", lambda ens: loss(ens).detach())
    with pytest.raises(TypeError, match="one module"):
        fastens.merge(members[0])
