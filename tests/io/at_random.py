"""Checkpoints drawn at random: ``python -m tests.io.at_random --draws 2000 --seed 1``.

A draw is a network, an average of it and the weights beside it, in a container, under names and wrappers as training
code has them, among what else it keeps. What is loaded is what was asked for, to the bit, or a ValueError.
"""

import argparse
import collections
import copy
import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import fastens
from fastens.io.names import WRAPPERS
from tests.checkpoint_layouts import lit_ema, shadow, spellings
from tests.io import containers

NAMES = (
    "block layers down mid norm attn to_q head embed net unet model mods schema avg_pool ema_proj online raw".split()
)
AVERAGES = [*sorted(set(spellings())), "running_avg", "moving_average", "pema", "karras_ema", "phema", "ema2"]
NOT_CALLED_SO = ("teacher", "slow", "smoothed", "target")  # averages to whom wrote the file
WEIGHTS = "model net unet state_dict network denoiser weights params G online raw model_no_ema student current".split()
PREFIXES = ("", "", "model.", "net.", "unet.", "model.diffusion_model.", "_denoiser.", "score_model.")
LAYERS = (
    lambda rng: nn.Linear(rng.randint(1, 4), rng.randint(1, 4), bias=rng.random() < 0.7),
    lambda rng: nn.Conv2d(2, rng.randint(1, 3), 1),
    lambda rng: nn.LayerNorm(rng.randint(1, 4)),
    lambda rng: nn.BatchNorm1d(3),
    lambda rng: nn.Embedding(3, 2),
    lambda rng: nn.Sequential(*(nn.Linear(2, 2) for _ in range(rng.randint(1, 3)))),
)


def network(seed):
    """The same network of each seed; some have a frozen parameter, or two that are one."""
    rng = random.Random(seed)

    def module(depth):
        made = nn.Module()
        for name in rng.sample(NAMES, rng.randint(2, 4)):
            if rng.random() < 0.15:
                made.register_parameter(name, nn.Parameter(torch.ones(rng.choice(((2,), (3,), (4,), ())))))
            else:
                made.add_module(
                    name, module(depth + 1) if rng.random() < 0.3 and depth < 2 else rng.choice(LAYERS)(rng)
                )
        return made

    made = module(0)
    if rng.random() < 0.2:
        rng.choice(list(made.parameters())).requires_grad_(False)
    linear = [m for m in made.modules() if isinstance(m, nn.Linear) and m.weight.shape == (2, 2)]
    if rng.random() < 0.3 and len(linear) > 1:
        linear[1].weight = linear[0].weight
    return made


def drawn(net, seed, dtype):
    """The network with values of which ``dtype`` keeps every bit."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(net)
    for tensor in other.state_dict().values():
        values = torch.randn(tensor.shape, generator=generator).to(dtype).float()
        tensor.copy_(values if tensor.is_floating_point() else values.mul(50).abs())
    return other


def of_trained(average, raw):
    """The average of what is trained, and the rest of the weights beside it."""
    mixed = copy.deepcopy(raw)
    ours = dict(mixed.named_parameters(remove_duplicate=False))
    for name, p in average.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            ours[name].data.copy_(p)
    return mixed


def wrapped(rng, net):
    """Names as wrappers make them, in front and within."""
    wrappers = sorted(WRAPPERS)
    front = [rng.choice(wrappers) for _ in range(rng.choice([0, 0, 1, 2]))]
    modules = [name for name, _ in net.named_modules() if name]
    inside = {n: rng.choice(wrappers) for n in rng.sample(modules, rng.choice([0, 0, min(2, len(modules))]))}
    names = {}
    for name, tensor in net.state_dict().items():
        parts, own = name.split("."), list(front)
        for i, part in enumerate(parts):
            own += [part, *([inside[key]] if (key := ".".join(parts[: i + 1])) in inside else [])]
        names[".".join(own)] = tensor.clone()
    return names


def beside(rng, net):
    """What else a training script keeps."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(p)} for i, p in enumerate(net.parameters())}
    kept = {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]},
        "step": 3,
        "args": argparse.Namespace(ema_decay=0.999),
        "config": {"ema": True, "model": "x"},
        "discriminator": {"conv.weight": torch.ones(3, 3, 1, 1)},
        "rng": torch.zeros(16, dtype=torch.uint8),
    }
    return {name: value for name, value in kept.items() if rng.random() < 0.3}


def content(rng, average, raw):
    """(what is saved, what ema=True means, what ema=False means)."""
    ema, name, prefix = (rng.choice(names) for names in (AVERAGES, WEIGHTS, PREFIXES))
    ema = rng.choice(NOT_CALLED_SO) if rng.random() < 0.1 else ema
    pair = {name: wrapped(rng, raw), ema: wrapped(rng, average)}
    items = list(pair.items())
    flat = {prefix + n: t for n, t in pair[name].items()} | {f"{ema}.{n}": t for n, t in pair[ema].items()}
    trained = {n: p.detach() for n, p in average.named_parameters() if p.requires_grad}
    return rng.choice(
        [
            lambda: (dict(rng.sample(items, 2)), average, raw),
            lambda: (flat if rng.random() < 0.5 else {"state_dict": flat}, average, raw),
            lambda: ({name: pair[name], ema: {"n_averaged": torch.tensor(3), **pair[ema]}}, average, raw),
            lambda: ({"state": {name: pair[name]}, ema: {"module": pair[ema], "decay": 0.9}}, average, raw),
            lambda: (
                {name: pair[name], ema: {"decay": 0.9, "shadow_params": shadow(average)}},
                of_trained(average, raw),
                raw,
            ),
            lambda: ({name: pair[name], ema: trained}, of_trained(average, raw), raw),
            lambda: (
                {
                    "state_dict": {
                        **{f"net.{n}": t for n, t in raw.state_dict().items()},
                        **lit_ema(average, "model_ema."),
                    }
                },
                of_trained(average, raw),
                raw,
            ),
            lambda: ({"state_dict": pair[name], "callbacks": {"EMA": {ema: pair[ema]}}}, average, raw),
            lambda: ({name: pair[name]}, raw, raw),
        ]
    )()


def packed(rng, average, raw, dtype, folder):
    """(where the checkpoint is, what ema=True means, what ema=False means, how to load it)."""
    kind = rng.random()
    if kind < 0.1:
        both = rng.random() < 0.7
        path = containers.snapshot(rng, average, raw if both else None, folder / "a.pkl")
        return path, average, raw if both else None, {"allow_pickle": True}
    if kind < 0.2:
        kept, meant = rng.choice(
            [
                ({"decay": 0.9, "shadow_params": shadow(average)}, of_trained(average, raw)),
                ({f"ema_model.{n}": t for n, t in average.state_dict().items()}, average),
            ]
        )
        weights, kept = containers.mapped([wrapped(rng, raw), kept], containers.stored_as(dtype))
        return containers.state_of_accelerate(rng, weights, kept, folder), meant, raw, {}
    saved, *expected = content(rng, average, raw)
    for name, value in beside(rng, average).items():
        saved.setdefault(name, value)
    saved = containers.mapped(saved, containers.stored_as(dtype))
    if all(isinstance(value, torch.Tensor) for value in saved.values()):
        if rng.random() < 0.5:
            return containers.shards(rng, saved, folder), *expected, {}
        path = folder / "a.safetensors"
        save_file({name: value.contiguous().clone() for name, value in saved.items()}, path)
    else:
        path = folder / "a.pt"
        saved = containers.views(saved) if rng.random() < 0.3 else saved
        old = rng.random() < 0.3 and dtype.itemsize > 1  # which torch does not read itself
        torch.save(saved, path, _use_new_zipfile_serialization=not old)
    return path, *expected, {}


def outcomes(seed, folder):
    """What two loads of one draw came to: "same", "refused", or what is wrong."""
    rng, net = random.Random(f"content {seed}"), network(seed)
    dtype = rng.choice(containers.DTYPES)
    average, raw = drawn(net, 2 * seed, dtype), drawn(net, 2 * seed + 1, dtype)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path, *expected, options = packed(rng, average, raw, dtype, Path(place))
        for ema, meant in zip((True, False), expected, strict=True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    loaded = fastens.load_members([path], lambda: network(seed), ema, **options)[0].state_dict()
            except ValueError as error:
                yield "refused" if str(path.parent) in str(error) else f"draw {seed}: {error} names no file"
                continue
            same = meant is not None and all(torch.equal(loaded[n], t) for n, t in meant.state_dict().items())
            yield "same" if same else f"draw {seed}, ema={ema}: other weights than those of {path.name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed * 1_000_000, options.seed * 1_000_000 + options.draws):
            for outcome in outcomes(seed, folder):
                counts[outcome if outcome in ("same", "refused") else "different"] += 1
                if outcome not in ("same", "refused"):
                    print(outcome, flush=True)
    print(", ".join(f"{number} {what}" for what, number in sorted(counts.items())))
    sys.exit(counts["different"] > 0)


if __name__ == "__main__":
    main()
