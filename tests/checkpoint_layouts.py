"""Checkpoints as training code writes them: averages of one network beside the weights of another."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Layout = Callable[[nn.Module, nn.Module], Any]


class Net(nn.Module):
    """A small network with a buffer, a frozen parameter and blocks, in the shape that wrappers nest."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.out = nn.Linear(8, 5)
        self.register_buffer("scale", torch.ones(8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 5]."""
        x = self.inp(x) * self.scale + self.frozen
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.out(x)


def made(seed: int) -> Net:
    """A network with every tensor drawn, buffers and frozen parameters too."""
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return net.eval()


def state(net: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in net.state_dict().items()}


def shadow(net: nn.Module, trainable: bool = True) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters() if p.requires_grad or not trainable]


def lit_ema(net: nn.Module, prefix: str, glue: str = "", separator: str = "") -> dict[str, Tensor]:
    """latent-diffusion's LitEma: buffers named as the trainable parameters without their dots."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return {prefix + (glue + name).replace(".", separator): p.detach().clone() for name, p in named.items()}


def wrapped(net: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Names as DDP, compilation, FSDP and activation checkpointing nest them, at the front and within."""
    wrap = {"inp.": "_orig_mod.inp.", "out.": "_checkpoint_wrapped_module.out."}
    names = {}
    for name, tensor in net.state_dict().items():
        for old, new in wrap.items():
            name = name.replace(old, new) if name.startswith(old) else name
        name = name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.")
        names[f"{prefix}module._orig_mod.{name}"] = tensor.clone()
    return names


def _latent_diffusion(average: nn.Module, raw: nn.Module) -> Any:
    names = {
        **state(raw, "model.diffusion_model."),
        **lit_ema(average, "model_ema.", "diffusion_model."),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "first_stage_model.encoder.weight": torch.ones(3),
        "cond_stage_model.logit_scale": torch.ones(1),
        "betas": torch.ones(4),
    }
    return {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.4", "state_dict": names, "callbacks": {}}


def _ema_pytorch(average: nn.Module, raw: nn.Module, inner: str) -> dict[str, Tensor]:
    return {
        **state(raw, f"online_model.{inner}"),
        **state(average, f"ema_model.{inner}"),
        "initted": torch.tensor(True),
        "step": torch.tensor(3),
    }


# Files that hold both: name -> what is saved of (average, raw).
BOTH: dict[str, Layout] = {
    "score_sde": lambda a, r: {
        "optimizer": {"state": {}, "param_groups": [{"params": [0]}]},
        "model": state(r, "module."),
        "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": shadow(a)},
        "step": 3,
    },
    "k-diffusion": lambda a, r: {"model": state(r), "model_ema": state(a), "opt": {}, "epoch": 1},
    "torchcfm": lambda a, r: {"net_model": state(r), "ema_model": state(a), "step": 3},
    "denoising-diffusion-pytorch": lambda a, r: {
        "step": 3,
        "model": {"betas": torch.ones(4), **state(r, "model.")},
        "opt": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "ema": _ema_pytorch(a, r, "model."),
        "scaler": None,
        "version": "2.3",
    },
    "latent-diffusion": _latent_diffusion,
    "LitEma at the root": lambda a, r: {"state_dict": {**state(r), **lit_ema(a, "model_ema.")}},
    "LitEma with underscores": lambda a, r: {"state_dict": {**state(r, "net."), **lit_ema(a, "ema.", "", "_")}},
    "glued EMA prefix": lambda a, r: {"state_dict": {**state(r, "net."), **lit_ema(a, "", "ema_", "_")}},
    "DiT": lambda a, r: {"model": state(r), "ema": state(a), "opt": {"state": {}}, "args": None},
    "MAR": lambda a, r: {"model": state(r), "model_ema": state(a), "optimizer": {}, "epoch": 4},
    "timm": lambda a, r: {"arch": "x", "state_dict": state(r), "state_dict_ema": state(a)},
    "net_ema": lambda a, r: {"net": state(r), "net_ema": state(a)},
    "ema_model_state_dict": lambda a, r: {"model_state_dict": state(r), "ema_model_state_dict": state(a)},
    "ema_state_dict": lambda a, r: {"state_dict": state(r), "ema_state_dict": state(a)},
    "ema_unet": lambda a, r: {"unet": state(r), "ema_unet": state(a)},
    "unetEMA": lambda a, r: {"unet": state(r), "unetEMA": state(a)},
    "G_ema": lambda a, r: {"G": state(r), "D": {"weight": torch.ones(4)}, "G_ema": state(a)},
    "EMA": lambda a, r: {"MODEL": state(r), "EMA": state(a)},
    "ema, nested": lambda a, r: {"model": {"module": state(r)}, "ema": {"module": state(a), "decay": 0.999}},
    "ema, nested twice": lambda a, r: {"train": {"net": state(r), "ema": {"model": {"module": state(a)}}}},
    "shadow": lambda a, r: {"model": state(r), "ema": {"shadow": state(a), "backup": {}}},
    "ema with its decay": lambda a, r: {"model": state(r), "ema_0.9999": state(a)},
    "EDM2's training state": lambda a, r: {
        "net": state(r),
        "ema": {"stds": [0.05], "emas": [state(a)]},
        "optimizer_state": {},
    },
    "AveragedModel": lambda a, r: {
        "model": state(r),
        "swa_model": {"n_averaged": torch.tensor(4), **state(a, "module.")},
    },
    "averaged": lambda a, r: {"model": state(r), "averaged_model": state(a)},
    "Lightning module with a copy": lambda a, r: {"state_dict": {**state(r, "net."), **state(a, "net_ema.")}},
    "Lightning module with ema-pytorch": lambda a, r: {
        "state_dict": {**state(r, "net."), **{f"ema.{k}": v for k, v in _ema_pytorch(a, r, "").items()}}
    },
    "Lightning's WeightAveraging": lambda a, r: {
        "state_dict": state(a, "net."),
        "current_model_state": state(r, "net."),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "EMA in the root's names": lambda a, r: {"state_dict": {**state(r), **state(a, "ema_model.")}},
    "diffusers' EMAModel": lambda a, r: {
        "unet": state(r),
        "ema": {"decay": 0.9999, "optimization_step": 4, "shadow_params": shadow(a, trainable=False)},
    },
    "a bare list": lambda a, r: {"model": state(r), "ema": shadow(a)},
    "no_ema": lambda a, r: {"model_no_ema": state(r), "model": state(r), "model_ema": state(a)},
    "wrappers anywhere": lambda a, r: {"model": wrapped(r), "ema": wrapped(a, "_forward_module.")},
    "wrapped Lightning module": lambda a, r: {"state_dict": {**wrapped(r, "net."), **wrapped(a, "net_ema.")}},
}

# Files that hold one set of weights that says nothing of averages, or only wrappers.
ONE: dict[str, Callable[[nn.Module], Any]] = {
    "guided-diffusion": lambda m: state(m),
    "DDP": lambda m: state(m, "module."),
    "compiled": lambda m: state(m, "_orig_mod."),
    "FSDP": lambda m: state(m, "_fsdp_wrapped_module."),
    "all wrappers": lambda m: wrapped(m),
    "state_dict": lambda m: {"state_dict": state(m), "epoch": 3},
    "model": lambda m: {"model": state(m), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "Lightning": lambda m: {"state_dict": state(m, "net."), "hyper_parameters": {"lr": 0.1}, "loops": {}},
    "no average was kept": lambda m: {"model": state(m), "ema": None, "model_ema": {}},
    "nested by modules": lambda m: {
        "model": {part: {n: t for n, t in sub.state_dict().items()} for part, sub in m.named_children()}
        | {"scale": m.get_buffer("scale"), "frozen": m.get_parameter("frozen").detach()}
    },
}


def spellings() -> Iterator[str]:
    """Names under which averages are kept beside ``model``."""
    for average in ("ema", "EMA", "Ema", "avg", "averaged", "shadow", "polyak", "swa"):
        yield average
        for word in ("model", "net", "unet", "denoiser", "state_dict", "weights", "params"):
            yield from (f"{average}_{word}", f"{word}_{average}", f"{average}-{word}", f"{average}{word.capitalize()}")
