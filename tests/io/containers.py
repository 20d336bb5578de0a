"""Containers of checkpoints drawn at random: what a draw holds is put in files and folders as libraries write them."""

import json
import pickle

import torch
from safetensors.torch import save_file

# float32, which views are of, as often as all others
DTYPES = (*[torch.float32] * 5, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def mapped(value, change):
    """The same dictionaries and lists with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, change) for key, inner in value.items()}
    return [mapped(inner, change) for inner in value] if isinstance(value, list) else value


def stored_as(dtype):
    """Floating-point tensors in a dtype; a draw's values are such as it keeps."""
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def views(saved):
    """Every floating-point tensor a view of one storage, matrices of it transposed: a flattened optimiser's weights."""
    found = []
    mapped(saved, lambda tensor: found.append(tensor) if tensor.dtype == torch.float32 else None)
    if not found:
        return saved
    flat = torch.cat([tensor.T.flatten() if tensor.ndim == 2 else tensor.flatten() for tensor in found])
    parts = iter(flat.split([tensor.numel() for tensor in found]))

    def view(tensor):
        if tensor.dtype != torch.float32:
            return tensor
        part = next(parts)
        return part.view(tensor.T.shape).T if tensor.ndim == 2 else part.view(tensor.shape)

    return mapped(saved, view)


def shards(rng, tensors, folder):
    """A folder of two or three shards and their index, by safetensors or by torch."""
    number, safe = rng.choice((2, 3)), rng.random() < 0.6
    stem, suffix = rng.choice(("model", "diffusion_pytorch_model")), "safetensors" if safe else "bin"
    names = [f"{stem}-{i + 1:05}-of-{number:05}.{suffix}" for i in range(number)]
    places = {name: rng.choice(names) for name in tensors}
    for file in set(places.values()):
        part = {name: tensors[name].contiguous().clone() for name, place in places.items() if place == file}
        save_file(part, folder / file) if safe else torch.save(part, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return rng.choice((folder, index))


def state_of_accelerate(rng, weights, average, folder):
    """The folder of ``Accelerator.save_state`` with an average that was registered for it."""
    if rng.random() < 0.5:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    torch.save({"last_epoch": 3}, folder / "scheduler.bin")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 3, "random_state": 1}))
    torch.save(average, folder / f"custom_checkpoint_{rng.choice((0, 1))}.pkl")
    return folder


def snapshot(rng, average, raw, path):
    """A pickle of whole modules, as EDM's training writes it."""
    saved = {"ema": average, "augment_pipe": None, "loss_fn": None, "dataset_kwargs": {"path": "x"}}
    saved |= {rng.choice(("net", "model", "G")): raw} if raw is not None else {}
    path.write_bytes(pickle.dumps(saved))
    return path
