"""Data whose density, and whose score at every noise level, is known."""

import math

import torch
from torch import nn


class MixtureNetwork(nn.Module):
    """Predicts the noise exactly for data from a mixture of Gaussians with equal isotropic variance."""

    def __init__(self, schedule, means, std, prediction="epsilon"):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.means = nn.Parameter(torch.as_tensor(means, dtype=torch.float64))  # [M, D]
        self.std = std

    def forward(self, x, network_time):
        t = self.schedule.time(network_time)
        alpha, sigma = self.schedule.coefficients(t, x)
        variance = alpha**2 * self.std**2 + sigma**2  # [B, 1]
        centres = alpha.unsqueeze(-1) * self.means.to(x.dtype)  # [B, M, D]
        offsets = x.unsqueeze(1) - centres
        logits = -0.5 * offsets.square().sum(-1) / variance
        share = logits.softmax(1).unsqueeze(-1)
        score = -(share * offsets).sum(1) / variance
        epsilon = -sigma * score
        x0 = (x - sigma * epsilon) / alpha
        if self.prediction == "score":
            return score
        if self.prediction == "x0":
            return x0
        if self.prediction == "v":
            return alpha * epsilon - sigma * x0
        if self.prediction == "flow":
            rates = self.schedule.alpha_rate(t), self.schedule.sigma_rate(t)
            return rates[0].view(-1, 1).to(x) * x0 + rates[1].view(-1, 1).to(x) * epsilon
        return epsilon

    def log_density(self, x, t):
        """Of the data noised to the time t, [B]."""
        alpha, sigma = (float(c) for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        variance = alpha**2 * self.std**2 + sigma**2
        size = x.shape[1]
        logs = -0.5 * (x.unsqueeze(1).double() - alpha * self.means.detach()).square().sum(-1) / variance
        return logs.logsumexp(1) - math.log(len(self.means)) - 0.5 * size * math.log(2 * math.pi * variance)

    def sample(self, num, seed=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(len(self.means), (num,), generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means.detach()[which] + self.std * noise
