"""MC Dropout: what is masked, what masks depend on, and what never changes them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from tests.networks import randomised, tensor_of, unet_2d
from tests.tolerances import NETWORK, relative_error

LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Layered(nn.Module):
    """A dropout layer of any kind between convolutions, used twice."""

    def __init__(self, layer=nn.Dropout, p=0.4):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.drop = layer(p)

    def forward(self, x, t=None):
        h = self.drop(F.silu(self.inner(x)))
        return self.outer(self.drop(h))


class Functional(Layered):
    """As in EDM: no dropout layer at all, and off in evaluation."""

    def __init__(self, p=0.4):
        super().__init__(nn.Identity, p)
        self.p = p

    def forward(self, x, t=None):
        h = F.dropout(F.silu(self.inner(x)), p=self.p, training=self.training)
        return self.outer(F.dropout(h, p=self.p, training=self.training))


class Attending(nn.Module):
    def __init__(self, need_weights=False):
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)

    def forward(self, x):
        x = x.flatten(1).reshape(len(x), -1, 8)
        return self.layer(self.attention(x, x, x, need_weights=self.need_weights)[0])


class SDPA(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.inner(x.flatten(1).reshape(len(x), -1, 8)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)


NETWORKS = {
    **{
        layer.__name__: lambda layer=layer: Layered(layer)
        for layer in LAYERS
        if layer not in (nn.Dropout1d, nn.Dropout3d)
    },
    "functional": Functional,
    "multi-head attention": Attending,
    "multi-head attention with weights": lambda: Attending(True),
    "scaled dot-product attention": SDPA,
}


@pytest.fixture
def x():
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_dropout_is_masked_and_fold_equals_loop(name, masks, x):
    network = randomised(NETWORKS[name], 0)
    ensemble = fastens.MCDropout(network, 3, masks=masks, seed=5)
    with torch.no_grad():
        outputs = ensemble.member_outputs(x)
        assert relative_error(outputs[0], network(x)) > 1e-3  # dropout is on though the network is in eval mode
        assert relative_error(outputs[0], outputs[1]) > 1e-3  # and differs between members
        assert ensemble.verify(x) < 1e-5
        assert ensemble.engine == "fold"
        again = ensemble.member_outputs(x)
        assert torch.equal(outputs, again) is (masks == "fixed")
        assert relative_error(fastens.MCDropout(network, 3, masks=masks, seed=5).member_outputs(x), outputs) < 1e-6
        assert relative_error(fastens.MCDropout(network, 3, masks=masks, seed=6).member_outputs(x), outputs) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_fixed_masks_do_not_depend_on_batch_or_sample(name, x):
    ensemble = fastens.MCDropout(randomised(NETWORKS[name], 0), 3)
    with torch.no_grad():
        whole = ensemble.member_outputs(x)
        assert relative_error(ensemble.member_outputs(x[2:3]), whole[:, 2:3]) < 1e-5
        same = ensemble.member_outputs(x[:1].expand(4, -1, -1, -1))
        assert relative_error(same, same[:, :1].expand_as(same)) < 1e-5


def test_layers_of_equal_shape_and_reuses_have_masks_of_their_own(x):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.stack([self.a(x), self.b(x), self.a(x)], 1) * self.w

    with torch.no_grad():
        kept = fastens.MCDropout(Two(), 2).member_outputs(torch.ones_like(x)) > 0
    assert not torch.equal(kept[:, :, 0], kept[:, :, 1])
    assert not torch.equal(kept[:, :, 0], kept[:, :, 2])


@pytest.mark.parametrize("layer", [nn.Dropout, nn.AlphaDropout])
def test_moments_are_those_of_dropout(layer):
    torch.manual_seed(0)
    x = torch.randn(64, 64, 8, 8)
    ensemble = fastens.MCDropout(nn.Sequential(nn.Conv2d(64, 64, 1), layer(0.2)), 2)
    reference = layer(0.2).train()
    with torch.no_grad():
        h = ensemble.network[0](x)
        ours, theirs = ensemble.member_outputs(x), reference(h)
    assert abs(ours.mean() - theirs.mean()) < 0.02
    assert abs(ours.std() - theirs.std()) < 0.02


def test_train_and_eval_change_nothing(x):
    network = randomised(lambda: nn.Sequential(Layered(), nn.BatchNorm2d(2)), 0).train()
    ensemble = fastens.MCDropout(network, 3)
    with torch.no_grad():
        expected = ensemble(x)
        assert torch.equal(ensemble.train()(x), expected)
        assert torch.equal(ensemble.eval()(x), expected)
        assert torch.equal(nn.Sequential(ensemble).train()(x), expected)
    assert network.training
    assert not any(m.training for m in ensemble.network.modules())
    assert int(network[1].num_batches_tracked) == 0


class LabelDropout(nn.Module):
    """Drops the label in training mode, as networks for guidance do, beside dropout of features."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(4, 8), nn.Dropout(0.5)

    def forward(self, x, y):
        y = torch.zeros_like(y) if self.training else y
        return x + self.drop(self.embedding(y))


def test_train_does_not_drop_labels():
    network = randomised(LabelDropout, 0)
    ensemble = fastens.MCDropout(network, 3)
    x, y = torch.zeros(3, 8), torch.tensor([1, 2, 3])
    with torch.no_grad():
        outputs = ensemble.train().member_outputs(x, y)
        unlabelled = 2 * network.embedding.weight[0]
        assert (outputs == 0).any()  # features are dropped
        assert not ((outputs - unlabelled).abs() < 1e-6).any()  # labels are not
        assert torch.equal(ensemble.eval().member_outputs(x, y), outputs)


def test_weights_are_held_once():
    network = Layered()
    ensemble = fastens.MCDropout(network, 7)
    count = sum(p.numel() for p in ensemble.parameters())
    assert count == sum(p.numel() for p in network.parameters())


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("make", [lambda: Layered(p=0.0), lambda: Functional(p=0.0), lambda: unet_2d(False), Bare])
def test_nothing_to_drop_is_loud(make):
    network = randomised(make, 0)
    x = torch.randn(2, getattr(getattr(network, "config", None), "in_channels", 2), 8, 8)
    args = (x, 3) if hasattr(network, "config") else (x,)
    with torch.no_grad(), pytest.raises(ValueError, match=r"pass p=0\.1"):
        fastens.MCDropout(network, 2)(*args)
    if make is Bare:
        with torch.no_grad(), pytest.raises(ValueError, match="no dropout"):
            fastens.MCDropout(network, 2, p=0.1)(*args)
        return
    ensemble = fastens.MCDropout(network, 2, p=0.1)
    with torch.no_grad():
        outputs = ensemble.member_outputs(*args)
        assert relative_error(tensor_of(ensemble(*args)), outputs.mean(0)) < 1e-5
    assert relative_error(outputs[0], outputs[1]) > 1e-3


def test_fresh_masks_are_shared_by_the_rows_of_a_guided_sample(x):
    ensemble = fastens.MCDropout(randomised(Layered, 0), 3, masks="fresh")
    guided = torch.cat([x, x])
    with torch.no_grad():
        for scope in (ensemble.trajectory(4, 7), ensemble.trajectory(4, 7), None):
            if scope is None:  # recognised by the repetition
                outputs = ensemble.member_outputs(guided)
            else:
                with scope:
                    outputs = ensemble.member_outputs(guided)
            assert torch.equal(outputs[:, :4], outputs[:, 4:])
            assert relative_error(outputs[:, 0], outputs[:, 1]) > 1e-3
        runs = []
        for _ in range(2):
            with ensemble.trajectory(4, torch.Generator().manual_seed(3)):
                runs.append([ensemble(x) for _ in range(2)])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "files"])
def test_copies_and_files(way, x, tmp_path):
    ensemble = fastens.MCDropout(randomised(Layered, 0), 3, "median", seed=4)
    if way == "files":
        ensemble.save_pretrained(tmp_path)
        other = fastens.Ensemble.from_pretrained(tmp_path, factory=Layered)
    else:
        other = copy.deepcopy(ensemble) if way == "deepcopy" else pickle.loads(pickle.dumps(ensemble))
    assert isinstance(other, fastens.MCDropout)
    with torch.no_grad():
        assert torch.equal(other(x), ensemble(x))


def test_random_rules_and_members(x):
    ensemble = fastens.MCDropout(randomised(Layered, 0), 3, "mixture")
    with torch.no_grad():
        outputs = ensemble.member_outputs(x)
        with ensemble.trajectory(4, 0):
            drawn = ensemble(x)
        nearest = [(outputs[:, i] - drawn[i]).abs().amax((1, 2, 3)).argmin().item() for i in range(4)]
        assert relative_error(drawn, torch.stack([outputs[k, i] for i, k in enumerate(nearest)])) < 1e-5
        assert relative_error(ensemble.members[1](x), outputs[1]) < 1e-5


def test_folds_in_parts(x):
    network = randomised(Layered, 0)
    with torch.no_grad():
        expected = fastens.MCDropout(network, 3)(x)
        assert relative_error(fastens.MCDropout(network, 3, max_fold=5)(x), expected) < 1e-5
        assert relative_error(fastens.MCDropout(network, 3, engine="loop")(x), expected) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after calls"])
def test_compiles_whole(x, dynamic, called):
    torch.compiler.reset()  # recompilations of all tests in one process would exceed their limit
    ensemble = fastens.MCDropout(randomised(Layered, 0), 3)
    compiled = torch.compile(ensemble, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for given in (x, x[:3, ..., :6]) if dynamic else (x,):
            expected = ensemble(given) if called else None
            found = compiled(given)
            assert relative_error(found, ensemble(given) if expected is None else expected) < NETWORK[torch.float32]


def test_fresh_masks_are_drawn_in_every_call_of_a_compiled_ensemble(x):
    ensemble = fastens.MCDropout(randomised(Layered, 0), 3, masks="fresh")
    compiled = torch.compile(ensemble, backend="aot_eager")
    runs = []
    with torch.no_grad():
        for call in (ensemble, compiled):
            with ensemble.trajectory(4, 0):
                runs.append(torch.stack([call(x) for _ in range(3)]))
    assert not torch.equal(runs[1][0], runs[1][1])
    assert relative_error(runs[1], runs[0]) < NETWORK[torch.float32]


@pytest.mark.parametrize("rule", ["alternating", "mixture", None])
def test_what_is_drawn_in_every_call_is_not_traced_whole(x, rule):
    network = randomised(Layered, 0)
    ensemble = fastens.MCDropout(network, 3, rule or "mean", masks="fixed" if rule else "fresh")
    with torch.no_grad(), ensemble.trajectory(4, 0):
        with pytest.raises(Exception, match="drawn anew in each call, which a graph would repeat"):
            torch.compile(ensemble, fullgraph=True, backend="eager")(x)
        with pytest.raises(RuntimeError, match="drawn anew in each call, which an exported program would repeat"):
            torch.export.export(ensemble, (x,))


def test_gradients_reach_input_and_weights(x):
    ensemble = fastens.MCDropout(randomised(Layered, 0), 3)
    with torch.no_grad():
        ensemble(x)
    x = x.requires_grad_()
    ensemble(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in ensemble.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastens.MCDropout([Layered()], 2), TypeError, "model is a list"),
        (lambda: fastens.MCDropout(Layered(), 0), ValueError, "num_members is 0"),
        (lambda: fastens.MCDropout(Layered(), 2, masks="consistent"), ValueError, "'fixed' or 'fresh'"),
        (lambda: fastens.MCDropout(Layered(), 2, p=1.0), ValueError, "p is 1.0"),
        (lambda: fastens.MCDropout(Layered(), 2, engine="vmap"), ValueError, "engine 'vmap'"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_recurrent_dropout_is_said_to_be_off():
    with pytest.warns(UserWarning, match="recurrent kernel"):
        fastens.MCDropout(nn.Sequential(nn.GRU(2, 2, 2, dropout=0.1), nn.Dropout(0.1)), 2)


class Writes(nn.Module):
    """Keeps a running mean of what its masks let through, in a way."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.dropout, self.how = nn.Linear(3, 3), nn.Dropout(0.3), how
        self.register_buffer("mean", torch.zeros(3))
        self.last = torch.zeros(3)

    def forward(self, x):
        h = self.dropout(self.linear(x))
        new = h.detach().mean(0)
        if self.how == "in place":
            self.mean.add_(new)
        elif self.how == "replaced":
            self.mean = self.mean + new
        elif self.how == "attribute":
            self.last = self.last + new
        elif self.how == "read":
            return h + self.mean if new.sum() > 0 else 2 * h
        elif self.how == "item":
            return h * new[0].item()
        return h + self.mean + self.last


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("how", ["in place", "replaced", "attribute", "read", "item"])
def test_what_a_member_writes_and_reads_is_its_own(how, engine, masks):
    """Each member as one network with its masks: another engine, and a member by itself, give the same."""
    torch.manual_seed(0)
    network, inputs = Writes(how), [torch.randn(2, 3) for _ in range(3)]
    ensemble = fastens.MCDropout(network, 3, engine=engine, masks=masks)
    looped = fastens.MCDropout(network, 3, engine="loop", masks=masks)
    alone = [fastens.MCDropout(network, 3, engine="loop", masks=masks).members[k] for k in range(3)]
    with torch.no_grad():
        for x in inputs:
            outputs = ensemble.member_outputs(x)
            torch.testing.assert_close(outputs, looped.member_outputs(x))
            if masks == "fixed":
                torch.testing.assert_close(outputs, torch.stack([member(x) for member in alone]))
        assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "saved"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_copies_keep_buffers_of_each_member(engine, how, tmp_path):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)), torch.randn(3, 8)
    ensemble = fastens.MCDropout(network, 3, engine=engine)
    with torch.no_grad():
        expected = ensemble(x)
        if how == "saved":
            ensemble.save_pretrained(tmp_path)
            copied = fastens.Ensemble.from_pretrained(tmp_path, factory=lambda: copy.deepcopy(network))
        else:
            copied = copy.deepcopy(ensemble) if how == "deepcopy" else pickle.loads(pickle.dumps(ensemble))
        torch.testing.assert_close(copied(x), expected)
