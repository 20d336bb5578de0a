"""No call waits for a device: in the steady state nothing reads a tensor's values on the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastens
from tests.networks import randomised, small_unet, tensor_of

BATCH = 4
TIMESTEPS = {
    "tensor [B]": lambda device: torch.full((BATCH,), 7, device=device),
    "0-d tensor": lambda device: torch.tensor(7, device=device),
    "0-d tensor on the CPU": lambda _: torch.tensor(7),
    "int": lambda _: 7,
    "float": lambda _: 7.5,
}
ENSEMBLES = {
    "mean": lambda members, **options: fastens.Ensemble(members, **options),
    "geometric": lambda members, **options: fastens.Ensemble(members, "geometric", **options),
    "alternating": lambda members, **options: fastens.Ensemble(members, "alternating", **options),
    "mixture": lambda members, **options: fastens.Ensemble(members, "mixture", **options),
    "fixed masks": lambda members, **options: fastens.MCDropout(members[0], 3, p=0.3, **options),
    "fresh masks": lambda members, **options: fastens.MCDropout(members[0], 3, p=0.3, masks="fresh", **options),
}


class HostReads(TorchDispatchMode):
    """Keeps the operations that bring values, or a shape that depends on them, to the host."""

    __module__ = "fastens"  # under a mode of a user's, members are called one by one

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def steady(name, device, **options):
    """An ensemble whose calls of every kind of timestep have been checked, and a batch."""
    members = [randomised(lambda: small_unet(True), seed).to(device) for seed in range(3)]
    ensemble = ENSEMBLES[name](members, **options)
    x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), ensemble.trajectory(BATCH, 0):
        for make in TIMESTEPS.values():
            for _ in range(2):
                ensemble(x, make(device))
    return ensemble, x


def test_a_read_is_seen():
    """The measure can fail: what a sampler's wrapper must not do is found."""
    for read in (lambda t: t.item(), float, bool, lambda t: torch.equal(t, t), lambda t: t.nonzero()):
        with HostReads() as reads:
            read(torch.tensor(7.0))
        assert reads.found


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}], ids=["planned", "folded"])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_no_call_reads_values(name, options):
    ensemble, x = steady(name, "cpu", **options)
    drawn = name in ("alternating", "mixture")
    for kind, make in TIMESTEPS.items():
        t = make("cpu")
        with torch.no_grad(), ensemble.trajectory(BATCH, 1), HostReads() as reads:
            ensemble(x, t)
        # whose row is whose is drawn on the CPU, and counted there
        allowed = {"aten.bincount.default", "aten.repeat_interleave.Tensor"} if drawn else set()
        assert set(reads.found) <= allowed, f"timestep as {kind}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["mean", "geometric", "fixed masks", "fresh masks"])
def test_no_call_waits_for_a_gpu(name):
    ensemble, x = steady(name, "cuda")
    timesteps = {kind: make("cuda") for kind, make in TIMESTEPS.items() if kind != "0-d tensor on the CPU"}
    expected = {}
    for kind, t in timesteps.items():
        with torch.no_grad(), ensemble.trajectory(BATCH, 1):
            expected[kind] = tensor_of(ensemble(x, t))
    torch.cuda.synchronize()
    for kind, t in timesteps.items():
        with torch.no_grad(), ensemble.trajectory(BATCH, 1):
            torch.cuda.set_sync_debug_mode("error")
            try:
                output = tensor_of(ensemble(x, t))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(output).all(), kind
        assert output.shape == expected[kind].shape
