"""Settings of diffusers' schedulers drawn at random: ``python -m tests.schedulers_at_random --draws 4000 --seed 1``.

A draw is a scheduler with some of its settings changed. Its own ``step`` is run with an oracle that knows the data, as
in ``tests/test_schedulers_of_diffusers.py``: where what we read is what it means, the run ends in the data; otherwise
the setting is refused. Three things keep a run from there whatever is read, and are measured on the run itself: the
noise that the last step leaves by its own settings, float32 (what outputs changed by a hundred-thousandth change, where
there is next to no data at the first step), and schedulers that round times (what one training step changes).
"""

import argparse
import collections
import dataclasses
import inspect
import random
import sys
import warnings

import diffusers
import torch

from fastens.parameterisation import path_input
from fastens.schedules import prediction_of
from tests.test_schedulers_of_diffusers import CLASSES, REFUSED, X0, made, oracle, run

SETTINGS = {
    "num_train_timesteps": [1000, 500, 100, 50],
    "beta_start": [1e-4, 1e-5, 8.5e-4, 1e-3],
    "beta_end": [0.02, 0.012, 0.05],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    "trained_betas": [None, torch.linspace(1e-4, 0.03, 60).tolist()],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [True, False],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 2.0],
    "thresholding": [False, True],
    "sample_max_value": [1.0, 3.0],
    "variance_type": ["fixed_small", "fixed_large", "fixed_small_log"],
    "use_karras_sigmas": [False, True],
    "use_exponential_sigmas": [False, True],
    "use_beta_sigmas": [False, True],
    "use_flow_sigmas": [False, True],
    "use_lu_lambdas": [False, True],
    "flow_shift": [1.0, 2.0, 5.0],
    "final_sigmas_type": ["zero", "sigma_min"],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "lower_order_final": [True, False],
    "euler_at_final": [True, False],
    "predict_x0": [True, False],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "sigma_min": [0.002, 0.01, 0.3],
    "sigma_max": [80.0, 20.0, 700.0],
    "sigma_data": [0.5, 1.0, 0.25],
    "sigma_schedule": ["karras", "exponential"],
    "rho": [7.0, 3.0],
    "shift": [1.0, 3.0, 6.0],
    "use_dynamic_shifting": [False, True],
    "shift_terminal": [None, 0.1],
    "invert_sigmas": [False, True],
    "stochastic_sampling": [False, True],
    "time_shift_type": ["exponential", "linear"],
    "original_inference_steps": [50, 20],
    "skip_prk_steps": [True, False],
    "eta": [0.0, 1.0],
    "snr_shift_scale": [1.0, 3.0],
    "corrector_order": [1, 2],
    "predictor_order": [1, 2],
    "timestep_scaling": [10.0, 1.0],
    "lambda_min_clipped": [-float("inf"), -5.1],
}
DDIM = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
ROUNDED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas")


def drawn(seed):
    """(the scheduler's name, its settings, the number of steps)."""
    rng = random.Random(f"scheduler {seed}")
    name = rng.choice([name for name in CLASSES if name not in REFUSED])
    taken = inspect.signature(CLASSES[name].__init__).parameters
    keys = [key for key in SETTINGS if key in taken]
    config = {key: rng.choice(SETTINGS[key]) for key in rng.sample(keys, min(len(keys), rng.randint(0, 5)))}
    steps = rng.choice((3, 5, 8, 20))
    if name == "PNDMScheduler":  # it extrapolates over several times, which it takes to be even: 50 divides all above
        steps = 50
    if (
        config.get("algorithm_type") == "sde-dpmsolver"
    ):  # a step by h in log(alpha / sigma) leaves 2 - exp(h) of the noise
        steps = config.get("num_train_timesteps", 1000) * 9 // 10
    return name, config, steps


def rounded(prediction, given, time):
    """The oracle's output as it is where numbers are rounded to a hundred-thousandth."""
    output = oracle(prediction, given, time)
    return output + 1e-5 * output.abs().max() * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))


def late(prediction, given, time):
    """The oracle asked a training step away."""
    return oracle(prediction, given, torch.as_tensor(time).double() + 1)


def left_noise(scheduler, prediction, config):
    """What of the noise the last step leaves, as a deviation; zero of schedulers that end in the data."""
    ends_early = type(scheduler).__name__ in ("DEISMultistepScheduler", "SASolverScheduler", "TCDScheduler")
    ends_early |= scheduler.config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
    if type(scheduler).__name__ in (*DDIM, "CogVideoXDPMScheduler"):
        end = int(scheduler.timesteps[-1]) - scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
        if end >= 0:  # where steps do not divide the training's, its last ends before the data
            return float(prediction.schedule.sigma(end))
    if type(scheduler).__name__ == "LCMScheduler":  # a consistency model's boundary: its last step keeps of its input
        skip, out = map(float, scheduler.get_scalings_for_boundary_condition_discrete(scheduler.timesteps[-1]))
        t = prediction.schedule.time(scheduler.timesteps[-1])
        kept = abs(skip * float(prediction.schedule.alpha(t)) + out - 1) * float(X0.abs().max())
        return skip * float(prediction.schedule.sigma(t)) + kept / 5
    sigmas = [float(prediction.schedule.sigma(0)), *map(float, getattr(scheduler, "sigmas", [0])[-1:])]
    if config.get("variance_type") == "fixed_large":  # drawn at every time but 0, where steps_offset ends before it
        return float(prediction.schedule.sigma(prediction.schedule.time(scheduler.timesteps[-1])))
    return max(sigmas) if ends_early else 0.0


def ended(name, config, steps, kind=None, network=oracle):
    """Where a run ends, how much noise its last step leaves at most, and whether every output was a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        scheduler = made(name, **config)
        prediction = prediction_of(scheduler)
        prediction = dataclasses.replace(prediction, kind=kind or prediction.kind)
        schedule, last, finite = prediction.schedule, [0.0, 0.0], True

        def recorded(prediction, given, time):
            nonlocal finite
            t = schedule.time(torch.as_tensor(time).double())
            x = path_input(prediction, given.double(), t, given.shape[1])
            last[:] = float(schedule.sigma(t)), float((x - schedule.alpha(t) * X0).abs().max())
            output = network(prediction, given, time)
            finite = finite and bool(output.isfinite().all() or not (given.isfinite().all() and t.isfinite().all()))
            return output

        end, _ = run(scheduler, prediction, steps, recorded)
        left = left_noise(scheduler, prediction, config)
        # DDIM may step to more noise than that of the next time; where that is its last, nothing of it is taken away.
        noise = max(5 * left, last[1] if last[0] <= left * (1 + 1e-6) else 0.0)
    return end.double(), noise, finite


def verdict(seed, kind=None):
    """ "ends in the data", "refused", "no scheduler" (diffusers itself refuses or fails), or how far off it ends."""
    name, config, steps = drawn(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = made(name, **config)
    except Exception:  # a setting that the scheduler does not take
        return "no scheduler"
    try:
        prediction_of(scheduler)
    except ValueError as error:
        return "refused" if name in str(error) else f"refused without its name: {error}"
    try:
        end, noise, finite = ended(name, config, steps, kind)
    except Exception:  # its own step or set_timesteps, with these settings
        return "no scheduler"
    if finite and not end.isfinite().all():
        return "no scheduler"  # of numbers its step makes none: no data at the first step, betas for fewer steps
    off = float((end - X0).abs().max()) - noise
    if off <= 5e-3:
        return "ends in the data"
    # PNDM's formulas are for even times, and linspace's are a step apart from them.
    others = [rounded, late] if name == "PNDMScheduler" or any(config.get(c) for c in ROUNDED) else [rounded]
    allowed = sum(float((ended(name, config, steps, kind, other)[0] - end).abs().max()) for other in others)
    # The sizes of PNDM's weights, 55/24, -59/24, ..., add up to 6.7: as much they make of what one output changes.
    if off <= (10 if name == "PNDMScheduler" else 5) * allowed:
        return "within rounding"
    return f"{off:.2g} off, where rounding makes {allowed:.2g}: {name}, {steps} steps, {config}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    counts = collections.Counter()
    for seed in range(options.seed * 1_000_000, options.seed * 1_000_000 + options.draws):
        outcome = verdict(seed)
        known = outcome in ("ends in the data", "within rounding", "refused", "no scheduler")
        counts[outcome if known else "off"] += 1
        if not known:
            print(seed, outcome, flush=True)
    print(", ".join(f"{number} {what}" for what, number in sorted(counts.items())))
    sys.exit(counts["off"] > 0)


if __name__ == "__main__":
    main()
