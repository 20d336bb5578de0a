"""Plans are the same in inference mode, whichever mode they were made in."""

import pytest
import torch

import fastens
from tests.fold.test_plans import members_of, scaled
from tests.networks import NETWORKS, tensor_of
from tests.tolerances import NETWORK, relative_error

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize(("name", "first"), [*((name, "inference") for name in NETWORKS), ("unet_2d", "no_grad")])
def test_a_plan_serves_both_modes(name, first):
    members, arguments = members_of(name)
    ensemble = fastens.Ensemble(members, engine="fold")
    kinds = []
    args, kwargs = scaled(arguments(2), 0.8)
    with torch.no_grad():
        expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members]).mean(0)
    for mode in (first, "inference", "no_grad", first):
        with MODES[mode]():
            found = tensor_of(ensemble(*args, **kwargs))
        assert relative_error(found, expected) < NETWORK[torch.float32]
        assert found.is_inference() == (mode == "inference")
        kinds.append(ensemble.report().plans)
    assert kinds[0], ensemble.report().why_no_plan
    assert all(later == kinds[0] for later in kinds)


@pytest.mark.parametrize("rule", ["median", "alternating"])
def test_inputs_of_inference_mode(rule):
    """What a sampler made in inference mode is an input like any other, and the call does not write to it."""
    members, arguments = members_of("unet_2d", 2)
    ensemble = fastens.Ensemble(members, rule, engine="fold")
    with torch.inference_mode():
        (x, *rest), _ = arguments(2)
        x = x + 1
        kept = x.clone()
        with ensemble.trajectory(2, 3):
            first = ensemble(x, *rest).sample
    with torch.no_grad(), ensemble.trajectory(2, 3):
        second = ensemble(x, *rest).sample
    assert torch.equal(x, kept)
    torch.testing.assert_close(first, second)
