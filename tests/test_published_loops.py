"""Loops over members as publications have them, against one run of their own sampler: the same numbers."""

import functools

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error

K, N, STEPS = 4, 3, 5
ALPHAS = torch.linspace(0.9999, 0.98, 1000, dtype=torch.float64).cumprod(0)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.condition, self.outer = nn.Linear(4, 16), nn.Linear(2, 16), nn.Linear(16, 4)

    def forward(self, x, t, y):
        return self.outer(torch.tanh(self.inner(x) + self.condition(y) + t[:, None] / 1000))


def members():
    return [randomised(Conditioned, k).double() for k in range(K)]


def ddim(model, x, y, guidance=None, eta=0.0, first=0):
    """DDIM as latent-diffusion has it, with or without guidance by a second condition, from a step on."""
    times = torch.linspace(999, 99, STEPS).long()
    for i in range(first, STEPS):
        t = times[i].expand(x.shape[0])
        now, then = ALPHAS[times[i]], ALPHAS[times[i + 1]] if i + 1 < STEPS else torch.tensor(1.0).double()
        if guidance is None:
            noise = model(x, t, y)
        else:
            plain, own = model(torch.cat([x] * 2), torch.cat([t] * 2), torch.cat([guidance, y])).chunk(2)
            noise = plain + 3.0 * (own - plain)
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        data = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x = then.sqrt() * data + (1 - then - sigma**2).sqrt() * noise + sigma * torch.randn(x.shape).double()
    return x


def test_hyper_diffusion():
    """HyperDM (arXiv 2402.03478), ``get_mean_variance``: N samples of each of M networks that a network made."""
    network, nets = randomised(Conditioned, 0).double(), members()
    weights = [dict(net.named_parameters()) for net in nets]
    y = torch.randn(1, 2, dtype=torch.float64).repeat(N, 1)
    mean, var = torch.zeros(K, 4).double(), torch.zeros(K, 4).double()
    for i in range(K):
        torch.manual_seed(0)
        called = functools.partial(torch.func.functional_call, network, weights[i])
        with torch.no_grad():
            found = ddim(lambda *args, called=called: called(args), torch.randn(N, 4).double(), y, eta=1.0)
        mean[i], var[i] = found.mean(0), found.var(0)

    ensemble = fastens.Ensemble(nets)
    torch.manual_seed(0)
    found = fastens.sample_members(
        lambda num: ddim(ensemble, torch.randn(num, 4).double(), y, eta=1.0), None, N, ensemble=ensemble
    )
    assert relative_error(found.mean(1), mean) < 1e-10
    assert relative_error(found.var(1), var) < 1e-10


def test_branches_with_each_members_own_conditions():
    """DECU (arXiv 2406.18580): one trajectory up to a branch, then each component by its own embeddings."""
    nets, start = members(), torch.randn(N, 4).double()
    own, none = torch.randn(2, K, N, 2, dtype=torch.float64)
    with torch.no_grad():
        separate = [ddim(net, start, own[k], none[k]) for k, net in enumerate(nets)]
    ensemble = fastens.Ensemble(nets)
    given = {"y": fastens.PerMember(list(own)), "guidance": fastens.PerMember(list(none))}
    found = fastens.sample_members(lambda num, **c: ddim(ensemble, start, **c), None, N, ensemble=ensemble, **given)
    assert relative_error(found, torch.stack(separate)) < 1e-10

    branch, y = 2, own[0]
    times = torch.linspace(999, 99, STEPS).long()
    x = start
    with torch.no_grad():
        for i in range(branch):  # the mean of all, as before the branch there
            t, now, then = times[i].expand(N), ALPHAS[times[i]], ALPHAS[times[i + 1]]
            noise = torch.stack([net(x, t, y) for net in nets]).mean(0)
            x = then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        branched = [ddim(net, x, y, first=branch) for net in nets]
    found = fastens.sample_members(lambda num: ddim(ensemble, start, y), None, N, ensemble=ensemble, branch_at=branch)
    assert relative_error(found, torch.stack(branched)) < 1e-10

    x = start
    with torch.no_grad():  # the same, where each has been guided by its own conditions from the start
        for i in range(branch):
            t, now, then = times[i].expand(N), ALPHAS[times[i]], ALPHAS[times[i + 1]]
            plain = torch.stack([net(x, t, none[k]) for k, net in enumerate(nets)]).mean(0)
            noise = plain + 3.0 * (torch.stack([net(x, t, own[k]) for k, net in enumerate(nets)]).mean(0) - plain)
            x = then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        branched = [ddim(net, x, own[k], none[k], first=branch) for k, net in enumerate(nets)]
    found = fastens.sample_members(
        lambda num, **c: ddim(ensemble, start, **c), None, N, ensemble=ensemble, branch_at=branch, **given
    )
    assert relative_error(found, torch.stack(branched)) < 1e-10


def test_last_layers_that_are_drawn_and_overwritten():
    """DIFF-UQ (arXiv 2502.20946) and BayesDiff (arXiv 2310.11142): whole runs, the last layer overwritten between."""
    network = randomised(Conditioned, 0).double()
    vector = parameters_to_vector(network.parameters()).detach()
    size = sum(p.numel() for p in network.outer.parameters())
    layers = vector[-size:] + 0.1 * torch.randn(K, size).double()
    start, y = torch.randn(N, 4).double(), torch.randn(N, 2).double()
    separate, drawn = [], []
    for layer in layers:
        vector[-size:] = layer
        vector_to_parameters(vector.clone(), network.parameters())
        with torch.no_grad():
            separate.append(ddim(network, start, y))
        drawn.append(Conditioned().double().eval())
        drawn[-1].load_state_dict(network.state_dict())
    ensemble = fastens.Ensemble(drawn)
    found = fastens.sample_members(lambda num: ddim(ensemble, start, y), None, N, ensemble=ensemble)
    assert relative_error(found, torch.stack(separate)) < 1e-10
