"""A folded network is the stack of its members, on networks of every kind."""

import pytest
import torch

import fastens
from fastens.ops.draw_members import draw_members
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error


@pytest.mark.covering(1)
@pytest.mark.parametrize("num_members", [1, 2, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_equals_the_members(name, num_members):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(num_members)]
    ensemble = fastens.Ensemble(members, engine="fold")
    for batch in (1, 2, 4):
        args, kwargs = arguments(batch)
        with torch.no_grad():
            expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
            outputs = tensor_of_stack(ensemble.member_outputs(*args, **kwargs))
            error = ensemble.verify(*args, **kwargs)
        assert relative_error(outputs, expected) < NETWORK[torch.float32]
        assert error < NETWORK[torch.float32]
    report = ensemble.report()
    assert report.engine == "fold"
    assert not report.looped


def tensor_of_stack(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", ["mlp", "unet_2d_attention", "pixart", "transformer_time_first", "edm_like", "gru"])
def test_ragged_rows_equal_the_drawn_members(name):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(3)]
    args, kwargs = arguments(4)
    ensemble = fastens.Ensemble(members, rule="mixture", engine="fold")
    with torch.no_grad(), ensemble.trajectory(4, 3):
        drawn = draw_members(3, 0, 3, 4)
        output = tensor_of(ensemble(*args, **kwargs))
        stack = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
    assert ensemble.engine == "fold"
    assert len(set(drawn.tolist())) > 1
    assert relative_error(output, stack[drawn, torch.arange(4)]) < NETWORK[torch.float32]


@pytest.mark.parametrize("max_fold", [1, 2, 5, 7, 12])
def test_max_fold_changes_nothing(max_fold):
    make, arguments = NETWORKS["unet_2d"]
    members = [randomised(make, seed) for seed in range(3)]
    args, kwargs = arguments(4)
    with torch.no_grad():
        expected = fastens.Ensemble(members).member_outputs(*args, **kwargs)
        capped = fastens.Ensemble(members, max_fold=max_fold)
        assert relative_error(capped.member_outputs(*args, **kwargs), expected) < NETWORK[torch.float32]
    assert capped.engine == "fold"


@pytest.mark.parametrize("name", ["mlp", "unet_2d", "transformer"])
def test_gradients_equal_the_loop(name):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed).double() for seed in range(3)]
    args, kwargs = arguments(2)
    gradients = []
    for engine in ("fold", "loop"):
        ensemble = fastens.Ensemble(members, engine=engine)
        x = args[0].double().requires_grad_()
        tensor_of(ensemble(x, *args[1:], **kwargs)).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in ensemble.parameters() if p.requires_grad)])
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-10
