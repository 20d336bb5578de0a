"""Which weights of a file are taken: in every layout of training code the average, or the weights beside it."""

import argparse
import itertools
import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import fastens
from tests.checkpoint_layouts import BOTH, ONE, Net, lit_ema, made, shadow, spellings, state


@pytest.fixture(scope="module")
def pair():
    """An average and the weights beside it; what is not trained is the same in both."""
    average, raw = made(0), made(1)
    with torch.no_grad():
        raw.scale.copy_(average.scale)
        raw.frozen.copy_(average.frozen)
    return average, raw


def load(content, path, factory=Net, ema=True, **options):
    torch.save(content, path)
    return fastens.load_members([path], factory, ema, **options)[0]


def assert_same(loaded, expected):
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("layout", BOTH)
def test_the_average_is_taken_and_the_weights_where_they_are_asked_for(layout, pair, tmp_path):
    average, raw = pair
    content = BOTH[layout](average, raw)
    assert_same(load(content, tmp_path / "a.pt"), average)
    assert_same(load(content, tmp_path / "a.pt", ema=False), raw)


@pytest.mark.parametrize("spelling", sorted(set(spellings())))
def test_every_spelling_of_an_average(spelling, pair, tmp_path):
    average, raw = pair
    content = {"model": state(raw), spelling: state(average)}
    assert_same(load(content, tmp_path / "a.pt"), average)
    assert_same(load(content, tmp_path / "a.pt", ema=False), raw)
    flat = {**state(raw, "net."), **state(average, f"{spelling}.")}
    assert_same(load({"state_dict": flat}, tmp_path / "a.pt"), average)


@pytest.mark.parametrize("layout", ONE)
@pytest.mark.parametrize("ema", [True, False])
def test_the_only_weights_are_taken(layout, ema, pair, tmp_path):
    assert_same(load(ONE[layout](pair[0]), tmp_path / "a.pt", ema=ema), pair[0])


@pytest.mark.parametrize("wrap", [lambda net: nn.DataParallel(net), torch.compile], ids=["DataParallel", "compile"])
def test_the_factory_may_wrap(wrap, pair, tmp_path):
    loaded = load({"model": state(pair[1]), "ema": state(pair[0], "module.")}, tmp_path / "a.pt", lambda: wrap(Net()))
    weights = {name.split(".", 1)[1]: tensor for name, tensor in loaded.state_dict().items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in pair[0].state_dict().items())


AMBIGUOUS = {
    "student and teacher": lambda a, r: {**state(a, "student."), **state(r, "teacher.")},
    "teacher beside model": lambda a, r: {"model": state(a), "teacher": state(r)},
    "target network": lambda a, r: {"model": state(a), "target_model": state(r)},
    "two networks of one shape": lambda a, r: {"state_dict": {**state(a, "net."), **state(r, "net_best.")}},
    "wrapped beside bare": lambda a, r: {**state(a, "module."), **state(r)},
    "two decays": lambda a, r: {"model": state(made(2)), "ema_0.999": state(a), "ema_0.9999": state(r)},
    "two profiles": lambda a, r: {"net": state(made(2)), "ema": {"stds": [0.05, 0.1], "emas": [state(a), state(r)]}},
    "two spellings": lambda a, r: {"model": state(made(2)), "ema": state(a), "ema_model": state(r)},
    "members of a list": lambda a, r: {**state(a, "members.0."), **state(r, "members.1.")},
}
KEYS = {
    "student and teacher": {"prefix": "student"},
    "teacher beside model": {"key": "model"},
    "target network": {"key": "model"},
    "two networks of one shape": {"prefix": "net."},
    "two decays": {"key": "ema_0.999"},
    "two profiles": {"key": "ema.emas.[0]"},
    "two spellings": {"key": "ema"},
    "members of a list": {"prefix": "members.0"},
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_two_that_fit_are_listed(name, pair, tmp_path):
    with pytest.raises(ValueError, match=r"(sets of weights that fit|list of modules).*") as error:
        load(AMBIGUOUS[name](*pair), tmp_path / "a.pt")
    assert name == "members of a list" or ("key=" in str(error.value) and str(error.value).count("tensors") == 2)


@pytest.mark.parametrize("name", KEYS)
def test_key_and_prefix_settle_it(name, pair, tmp_path):
    assert_same(load(AMBIGUOUS[name](*pair), tmp_path / "a.pt", **KEYS[name]), pair[0])
    assert_same(load(AMBIGUOUS[name](*pair), tmp_path / "a.pt", ema=False, **KEYS[name]), pair[0])


NOT_UNDERSTOOD = {
    "another shape": lambda a, r: {"model": state(r), "ema": nn.Linear(3, 3).state_dict()},
    "a part of the network": lambda a, r: {"model": state(r), "ema": {"inp.weight": a.inp.weight.detach()}},
    "a list of another length": lambda a, r: {"model": state(r), "ema": {"shadow_params": shadow(a)[1:]}},
    "a list of other shapes": lambda a, r: {"model": state(r), "ema": shadow(a)[::-1]},
    "one long vector": lambda a, r: {"model": state(r), "ema": torch.cat([p.flatten() for p in a.parameters()])},
    "inside a word": lambda a, r: {"model": state(r), "modelema": state(a)},
    "names of a third kind": lambda a, r: {"model": state(r), "ema": {f"p{i}": p for i, p in enumerate(shadow(a))}},
    "arrays": lambda a, r: {"model": state(r), "ema": {k: v.numpy() for k, v in state(a).items()}},
    "LitEma of more": lambda a, r: {"state_dict": {**state(r, "net."), **lit_ema(a.blocks, "net_ema.")}},
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_looks_like_an_average_and_is_not_understood_is_named(name, pair, tmp_path):
    content = NOT_UNDERSTOOD[name](*pair)
    with pytest.raises(ValueError, match=r"look like averages.*ema"):
        load(content, tmp_path / "a.pt")
    assert_same(load(content, tmp_path / "a.pt", ema=False), pair[1])


@pytest.mark.parametrize(
    "keys", [("optimizer", "exp_avg"), ("train", "optim", "exp_avg"), ("grads",), ("opt", "exp_avg_sq")]
)
def test_what_an_optimiser_keeps_is_no_set_of_weights(keys, pair, tmp_path):
    content = state(pair[0])
    for key in reversed(keys):
        content = {key: content}
    for ema in (True, False):
        assert_same(load({"model": state(pair[1]), **content}, tmp_path / "a.pt", ema=ema), pair[1])
    with pytest.raises(ValueError, match="does not fit"):
        load(content, tmp_path / "a.pt")


@pytest.mark.parametrize("beside", ["momentum_model", "velocity_net", "teacher", "semantic_net", "best", "pretrained"])
@pytest.mark.parametrize("ema", [True, False])
def test_other_networks_are_not_passed_over(beside, ema, pair, tmp_path):
    with pytest.raises(ValueError, match=rf"2 sets of weights that fit.*{beside}"):
        load({"model": state(pair[1]), beside: state(pair[0])}, tmp_path / "a.pt", ema=ema)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", ["what is trained", "more at its side"])
def test_sets_that_fit_but_for_a_part_are_not_passed_over(name, ema, pair, tmp_path):
    """An average that is not called so lacks buffers; a bare tensor beside the weights makes them look larger."""
    average, raw = pair
    content = {
        "what is trained": {"model": state(raw), "slow": dict(average.named_parameters())},
        "more at its side": {**state(raw), **state(average, "slow."), "noise": torch.ones(4)},
    }[name]
    with pytest.raises(ValueError, match=r"2 sets of weights that fit.*slow"):
        load(content, tmp_path / "a.pt", ema=ema)


def test_a_frozen_factory_does_not_make_a_part_of_an_average_whole(pair, tmp_path):
    content = {"model": state(pair[1]), "ema": {"inp.weight": pair[0].inp.weight.detach()}}
    factory = lambda: Net().requires_grad_(False)  # noqa: E731
    with pytest.raises(ValueError, match="look like averages"):
        load(content, tmp_path / "a.pt", factory)
    assert_same(load(BOTH["diffusers' EMAModel"](*pair), tmp_path / "a.pt", factory), pair[0])


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", ["updates", "smoothed", "teacher_params"])
@pytest.mark.parametrize("trainable", [True, False])
def test_lists_without_names_that_fit_are_not_passed_over(name, ema, trainable, pair, tmp_path):
    content = {"model": state(pair[1]), name: shadow(pair[0], trainable)}
    with pytest.raises(ValueError, match=rf"2 sets of weights that fit.*{name}"):
        load(content, tmp_path / "a.pt", ema=ema)
    assert_same(load(content, tmp_path / "a.pt", ema=ema, key="model"), pair[1])
    assert_same(load({"model": state(pair[1]), "optim": shadow(pair[0], trainable)}, tmp_path / "a.pt"), pair[1])


@pytest.mark.parametrize("name", ["EMAnet", "emanet", "modelema"])
@pytest.mark.parametrize("kept", [shadow, state], ids=["a list", "names"])
def test_an_average_inside_a_word_is_not_passed_over(name, kept, pair, tmp_path):
    content = {"model": state(pair[1]), name: kept(pair[0])}
    with pytest.raises(ValueError, match=rf"look like averages.*{name}"):
        load(content, tmp_path / "a.pt")
    assert_same(load(content, tmp_path / "a.pt", key=name), pair[0])
    assert_same(load(content, tmp_path / "a.pt", ema=False), pair[1])


@pytest.mark.parametrize("kept", [shadow, state], ids=["a list", "names"])
def test_an_average_among_an_optimisers_states_is_not_passed_over(kept, pair, tmp_path):
    """NeMo's optimiser keeps the average of the weights."""
    states = [{"opt": {"state": {}}, "ema": kept(pair[0]), "current_step": 3, "decay": 0.999}]
    content = {"state_dict": state(pair[1]), "optimizer_states": states}
    with pytest.raises(ValueError, match=r"not clear which is meant: optimizer_states\.\[0\]\.ema"):
        load(content, tmp_path / "a.pt")
    assert_same(load(content, tmp_path / "a.pt", key="optimizer_states.[0].ema"), pair[0])
    assert_same(load(content, tmp_path / "a.pt", ema=False), pair[1])


def test_snapshots_without_a_factory(pair, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"ema": pair[0], "augment_pipe": nn.Linear(2, 2), "loss_fn": None}))
    assert_same(fastens.load_members([path], allow_pickle=True)[0], pair[0])
    with pytest.raises(ValueError, match=r"holds the networks \['augment_pipe', 'ema'\]; say which by key="):
        fastens.load_members([path], ema=False, allow_pickle=True)[0]
    assert isinstance(fastens.load_members([path], key="augment_pipe", allow_pickle=True)[0], nn.Linear)


def test_a_key_for_each_member(pair, tmp_path):
    torch.save({"ema": {"stds": [0.05, 0.1], "emas": [state(net) for net in pair]}}, tmp_path / "a.pt")
    members = fastens.load_members([tmp_path / "a.pt"] * 2, Net, key=["ema.emas.[0]", "ema.emas.[1]"])
    for member, net in zip(members, pair, strict=True):
        assert_same(member, net)
    with pytest.raises(ValueError, match="key names 2 dictionaries for 1 checkpoints"):
        fastens.load_members([tmp_path / "a.pt"], Net, key=["a", "b"])


def test_averages_alone(pair, tmp_path):
    with pytest.raises(ValueError, match="averaged weights alone"):
        load({"ema": state(pair[0])}, tmp_path / "a.pt", ema=False)
    assert_same(load({"ema": state(pair[0])}, tmp_path / "a.pt", ema=False, key="ema"), pair[0])


class Frozen(nn.Module):
    """A network with a frozen part, drawn anew each time or the same."""

    def __init__(self, drawn: bool):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4) if drawn else torch.arange(4.0), requires_grad=False)
        self.linear = nn.Linear(4, 4)


@pytest.mark.parametrize("root", [True, False])
def test_an_average_alone_needs_what_it_lacks_to_be_the_same_each_time(root, tmp_path):
    def saved(net):
        ema = {"decay": 0.99, "shadow_params": shadow(net)}
        return ema if root else {"ema": ema}

    net = Frozen(False)
    assert_same(load(saved(net), tmp_path / "a.pt", lambda: Frozen(False)), net)
    with pytest.raises(ValueError, match=r"no values of \['table'\]"):
        load(saved(Frozen(True)), tmp_path / "a.pt", lambda: Frozen(True))
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"no values of .*running_mean"):
        load(saved(norm), tmp_path / "a.pt", lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("dropped", ["embed.weight", "head.weight"])
def test_tied_weights_that_a_format_drops(dropped, tmp_path):
    net = Tied()
    names = state(net)
    del names[dropped]
    save_file(names, tmp_path / "a.safetensors")
    save_model(net, str(tmp_path / "b.safetensors"))
    for file in ("a", "b"):
        loaded = fastens.load_members([tmp_path / f"{file}.safetensors"], Tied)[0]
        assert torch.equal(loaded.embed.weight, net.embed.weight)
        assert loaded.head.weight is loaded.embed.weight


def test_tied_weights_that_a_file_has_apart_are_refused(tmp_path):
    content = {"embed.weight": torch.ones(6, 4), "head.weight": torch.zeros(6, 4)}
    with pytest.raises(ValueError, match=r"one tensor in the network, and two different"):
        load(content, tmp_path / "a.pt", Tied)


def test_names_of_the_network_itself_may_look_like_wrappers_and_averages(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.ema = nn.Linear(2, 2)

    net = Own()
    for content in (state(net), state(net, "module."), {"ema": state(net, "module."), "model": state(Own())}):
        assert_same(load(content, tmp_path / "a.pt", Own), net)
    with pytest.raises(ValueError, match="do not fit"):
        load({"ema.weight": torch.ones(2, 2)}, tmp_path / "a.pt", Own)


def test_a_part_of_a_larger_network_is_not_taken_for_the_whole(tmp_path):
    deep = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="does not fit"):
        load(state(deep), tmp_path / "a.pt", lambda: nn.Linear(5, 4))
    longer = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match=r"the network has no 2\.bias"):
        load(state(longer), tmp_path / "a.pt", lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))))


def test_weights_in_a_layout_that_no_network_has_are_refused(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(4, 4), 0.5, 0, torch.qint8)
    for weight in (torch.ones(4, 4).to_sparse(), quantised, torch.ones(4, 4, device="meta")):
        content = {"model": {"weight": weight}, "args": argparse.Namespace(lr=0.1)}
        with pytest.raises(ValueError, match="quantised"):
            load(content, tmp_path / "a.pt", lambda: nn.Linear(4, 4, bias=False))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_weights_are_refused(dtype, tmp_path):
    with pytest.raises(ValueError, match="quantised"):
        load({"weight": torch.ones(4, 4, dtype=dtype)}, tmp_path / "a.pt", lambda: nn.Linear(4, 4, bias=False))


def test_names_that_the_network_renames_as_it_reads(tmp_path):
    old = nn.utils.weight_norm(nn.Linear(4, 4))  # weight_g, weight_v
    new = lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))  # noqa: E731
    x = torch.randn(2, 4)
    for content in (state(old), {"state_dict": state(old, "module.")}):
        assert torch.allclose(load(content, tmp_path / "a.pt", new)(x), old(x))


def test_records_beside_the_weights_do_not_need_a_pickle(pair, tmp_path):
    content = {"model": state(pair[1]), "ema": state(pair[0]), "args": argparse.Namespace(lr=0.1, path=tmp_path)}
    assert_same(load(content, tmp_path / "a.pt"), pair[0])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16", "float64"])
def test_records_beside_weights_of_every_dtype(dtype, tmp_path):
    content = {"model": {"weight": torch.ones(4, 4).to(getattr(torch, dtype))}, "args": argparse.Namespace(lr=0.1)}
    loaded = load(content, tmp_path / "a.pt", lambda: nn.Linear(4, 4, bias=False))
    assert torch.equal(loaded.weight, torch.ones(4, 4))


@pytest.mark.parametrize("old", [True, False])
def test_whole_modules_with_the_opt_in(old, pair, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": pair[1], "ema": pair[0]}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"execute code.*allow_pickle=True"):
        fastens.load_members([path], Net)[0]
    for factory, ema in itertools.product((Net, None), (True, False)):
        loaded = fastens.load_members([path], factory, ema, allow_pickle=True)[0]
        assert_same(loaded, pair[not ema])
        assert not loaded.training


def test_what_is_loaded_infers(pair, tmp_path):
    def factory():
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()

    loaded = load(factory().state_dict(), tmp_path / "a.pt", factory)
    assert not any(module.training for module in loaded.modules())
    ensemble = fastens.Ensemble(fastens.load_members([tmp_path / "a.pt"] * 2, factory))
    x = torch.ones(3, 4)
    with torch.no_grad():
        assert torch.equal(ensemble(x), ensemble(x))


def test_a_factory_that_returns_one_network_makes_members_of_their_own(pair, tmp_path):
    for k, net in enumerate(pair):
        torch.save(state(net), tmp_path / f"{k}.pt")
    one = Net()
    members = list(fastens.load_members([tmp_path / "0.pt", tmp_path / "1.pt"], lambda: one))
    assert_same(members[0], pair[0])
    assert_same(members[1], pair[1])


def test_a_file_is_what_its_first_bytes_say(pair, tmp_path):
    save_file(state(pair[0]), tmp_path / "a.ckpt")
    torch.save(state(pair[0]), tmp_path / "a.pkl")
    for name in ("a.ckpt", "a.pkl"):
        assert_same(fastens.load_members([tmp_path / name], Net)[0], pair[0])
