"""One value says what an output means: to the ensemble, the denoiser and the samplers, from schedulers or by hand."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    VQDiffusionScheduler,
)
from torch import nn

import fastens.demo
from fastens import schedules
from fastens.evaluation import Denoiser, sample
from fastens.parameterisation import convert
from fastens.samplers import Sampler
from fastens.schedules import Prediction
from tests.evaluation.densities import MixtureNetwork
from tests.networks import randomised
from tests.tolerances import relative_error

K, B = 3, 2
STEPS = schedules.Discrete.linear()
RULES = ["geometric", "dominant", "sum"]  # what the conversion changes


class Network(nn.Module):
    def __init__(self, channels=3, given=3):
        super().__init__()
        self.inner = nn.Conv2d(given, channels, 3, padding=1)

    def forward(self, x, t):
        return self.inner(x).tanh() + 0.1


class Head(nn.Module):
    """Predicts a token's noise and its variance from the token, as MAR's diffusion head does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 8)

    def forward(self, x, t):
        return self.inner(x).tanh()


def members(channels=3, given=3):
    return [randomised(lambda: Network(channels, given), seed) for seed in range(K)]


def batch(channels=3):
    return torch.randn(B, channels, 4, 4, generator=torch.Generator().manual_seed(0))


def stack(networks, x, t=400):
    with torch.no_grad():
        return torch.stack([network(x, t) for network in networks])


def by_hand(scores, x, rule, kind="epsilon", target="x0", t=400):
    """The rule on scores [K, B, C, ...] in another parameterisation, where x is on the path."""
    moved = convert(scores, x, t, STEPS, kind, target)
    return convert(fastens.aggregate(moved, rule), x, t, STEPS, target, kind)


# Input channels that are not noisy, output channels that are variances


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("channels", [(0, 3), (2, 5)], ids=["first", "last"])
@pytest.mark.parametrize("out", [3, 6], ids=["scores", "variances"])
def test_a_conversion_takes_the_noisy_channels(channels, out, rule):
    networks, x = members(out, 5), batch(5)
    said = Prediction("epsilon", STEPS, noisy_channels=channels)
    scores = stack(networks, x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fastens.Ensemble(networks, rule, prediction=said, aggregate_in="x0")(x, 400)
    wanted = by_hand(scores[:, :, :3].contiguous(), x[:, slice(*channels)], rule)
    assert relative_error(found[:, :3], wanted) < 1e-4
    if out == 6:
        assert relative_error(found[:, 3:], scores[:, :, 3:].mean(0)) < 1e-5


@pytest.mark.parametrize(
    ("given", "out", "said"),
    [(9, 4, {}), (6, 3, {}), (6, 6, {"variances": True}), (3, 4, {}), (3, 3, {"noisy_channels": (2, 4)})],
    ids=["inpainting", "super-resolution", "with variances", "more out", "no such channels"],
)
def test_channels_that_nobody_said_are_an_error(given, out, said):
    ensemble = fastens.Ensemble(
        members(out, given), "dominant", prediction=Prediction("epsilon", STEPS, **said), aggregate_in="x0"
    )
    with pytest.raises(ValueError, match="noisy_channels"):
        ensemble(batch(given), 400)


def test_learned_variances_of_a_scheduler_beside_an_image():
    """6 channels in, 6 out: by their sizes all were scores."""
    networks, x = members(6, 6), batch(6)
    scheduler = DDPMScheduler(variance_type="learned_range")
    with torch.no_grad():
        found = fastens.Ensemble(networks, "dominant", schedule=scheduler)(x, 400)
    scores = stack(networks, x)
    assert relative_error(found[:, :3], fastens.aggregate(scores[:, :, :3].contiguous(), "dominant")) < 1e-5
    assert relative_error(found[:, 3:], scores[:, :, 3:].mean(0)) < 1e-5
    with pytest.raises(ValueError, match="noisy_channels"):
        fastens.Ensemble(networks, "dominant", schedule=scheduler, aggregate_in="x0")(x, 400)


def tokens():
    return [randomised(Head, seed) for seed in range(K)], batch().reshape(-1, 4)


@pytest.mark.parametrize("make", [lambda: (members(6), batch()), tokens], ids=["image", "token"])
@pytest.mark.parametrize("said", [None, True, False])
def test_twice_the_channels_are_variances_unless_said_otherwise(make, said):
    networks, x = make()
    scores, half = stack(networks, x), x.shape[1]
    ensemble = fastens.Ensemble(networks, "dominant", prediction=Prediction(variances=said))
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = ensemble(x, 400)
    assert ["variances=True" in str(w.message) for w in told] == ([True] if said is None else [])
    wanted = fastens.aggregate(scores, "dominant")
    if said is not False:
        wanted = torch.cat([wanted[:, :half], scores[:, :, half:].mean(0)], 1)
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("given", "out", "said"), [(3, 3, {}), (3, 8, {}), (6, 6, {"noisy_channels": 2})], ids=["odd", "too many", "others"]
)
def test_variances_that_are_not_there_are_an_error(given, out, said):
    ensemble = fastens.Ensemble(members(out, given), "dominant", prediction=Prediction(variances=True, **said))
    with pytest.raises(ValueError, match="takes variances=False"):
        ensemble(batch(given), 400)


def test_an_output_that_is_no_prediction_is_an_error_where_it_would_be_converted():
    class Two(Network):
        def forward(self, x, t):
            return super().forward(x, t), x.mean((2, 3))

    said = {"prediction": "epsilon", "schedule": STEPS, "aggregate_in": "x0"}
    with pytest.raises(ValueError, match=r"noisy input|return their prediction alone"):
        fastens.Ensemble([Two() for _ in range(K)], "dominant", **said)(batch(), 400)
    with pytest.raises(ValueError, match="one per sample"):
        fastens.Ensemble(members(), "dominant", **said)(batch(), torch.full((B, 7), 400))


# Schedulers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("make", [EDMEulerScheduler, EulerDiscreteScheduler])
def test_a_rule_in_x0_is_that_of_the_data_that_the_scheduler_finds(make, kind, rule):
    """Its own step, one member at a time, says what the data are; the ensemble's step then finds their aggregate."""
    scheduler, networks = make(prediction_type=kind), members()
    scheduler.set_timesteps(9)
    t = scheduler.timesteps[4]

    def data(network):
        twin, x = copy.deepcopy(scheduler), 3 * batch()
        output = network(twin.scale_model_input(x, t), t)
        return twin.step(output, t, x).pred_original_sample

    with torch.no_grad():
        wanted = fastens.aggregate([data(network) for network in networks], rule)
        found = data(fastens.Ensemble(networks, rule, aggregate_in="x0", schedule=scheduler))
    assert relative_error(found, wanted) < 1e-4


def test_sources_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match=r"prediction is 'epsilon' by prediction=, but 'edm' by .*EDMEulerScheduler"):
        fastens.Ensemble(members(), prediction="epsilon", schedule=EDMEulerScheduler())
    with pytest.raises(ValueError, match="schedule is"):
        fastens.Ensemble(members(), prediction=Prediction("epsilon", schedules.VP()), schedule=STEPS)
    with pytest.raises(ValueError, match="variances is False by prediction=, but True by"):
        fastens.Ensemble(
            members(6), prediction=Prediction(variances=False), schedule=DDPMScheduler(variance_type="learned")
        )
    with pytest.raises(ValueError, match="VQDiffusionScheduler"):
        fastens.Ensemble(members(), schedule=VQDiffusionScheduler(num_vec_classes=8))
    with pytest.raises(TypeError, match="prediction is a int"):
        fastens.Ensemble(members(), prediction=3)


# The value


SAID = [
    Prediction(),
    Prediction("v", STEPS, variances=True),
    Prediction("edm", schedules.EDM(log_time=True), 0.5, "unit_variance", (1, 4), False),
]


@pytest.mark.parametrize("said", SAID, ids=["nothing", "v", "all"])
def test_it_is_a_value(said, tmp_path):
    assert schedules.prediction_from_dict(json.loads(json.dumps(said.to_dict()))) == said
    assert pickle.loads(pickle.dumps(said)) == said
    assert hash(copy.deepcopy(said)) == hash(said)
    fastens.Ensemble(members(), "median", prediction=said).save_pretrained(tmp_path)
    assert fastens.Ensemble.from_pretrained(tmp_path, Network)._prediction == said


def test_older_files_name_the_kind_and_have_the_schedule_apart(tmp_path):
    fastens.Ensemble(members()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"] |= {"prediction": "v", "schedule": STEPS.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fastens.Ensemble.from_pretrained(tmp_path, Network)._prediction == Prediction("v", STEPS)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Prediction("noise"), ValueError, "prediction 'noise' is unknown"),
        (lambda: Prediction("edm"), ValueError, "'edm' needs sigma_data="),
        (
            lambda: Prediction("v", STEPS, input_scaling="unit_variance"),
            ValueError,
            "'unit_variance' needs sigma_data=",
        ),
        (lambda: Prediction(input_scaling="half"), ValueError, "input_scaling 'half' is unknown"),
        (lambda: Prediction(sigma_data=-1.0), ValueError, "sigma_data is -1.0"),
        (lambda: Prediction(noisy_channels=(3, 3)), ValueError, "noisy_channels is"),
        (lambda: Prediction(noisy_channels=(0, 1, 2)), ValueError, "noisy_channels is"),
        (lambda: Prediction("v", DDIMScheduler()), TypeError, "prediction_of"),
        (lambda: schedules.prediction_from_dict({"kinds": "v"}), ValueError, "kinds"),
    ],
)
def test_bad_fields(make, error, message):
    with pytest.raises(error, match=message):
        make()


# The denoiser


def test_a_denoiser_says_what_its_ensemble_says():
    ensemble = fastens.Ensemble(members(), prediction="v", schedule=STEPS)
    assert Denoiser(ensemble).prediction == Denoiser(ensemble, STEPS).prediction == Prediction("v", STEPS)
    assert Denoiser(fastens.Ensemble(members()), STEPS).prediction.kind == "epsilon"
    assert Denoiser(members()[0], DDIMScheduler(prediction_type="sample")).prediction.kind == "x0"
    for wrong in ({"prediction": "epsilon"}, {"schedule": schedules.VP()}):
        with pytest.raises(ValueError, match=r"by the denoiser's arguments, but .* by the ensemble"):
            Denoiser(ensemble, **wrong)
    with pytest.raises(ValueError, match="expected the noise schedule"):
        Denoiser(members()[0])
    with pytest.raises(ValueError, match="with x alone"):
        Denoiser(members()[0], STEPS, Prediction("v", noisy_channels=2))
    with pytest.raises(ValueError, match="expected its shape"):
        Denoiser(members(4)[0], STEPS).at(batch(), torch.tensor(400))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(prediction_type="v_prediction"), EDMEulerScheduler()], ids=repr)
def test_what_a_scheduler_says_goes_with_the_schedule_that_is_read_from_it(scheduler):
    schedule = schedules.from_scheduler(scheduler)
    for given in (schedule, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert Denoiser(members()[0], given).prediction == schedules.prediction_of(scheduler)
        assert given == schedules.from_dict(schedule.to_dict())
    with pytest.raises(ValueError, match="'epsilon' by prediction=, but"):
        Denoiser(members()[0], schedule, "epsilon")


def test_the_schedule_alone_of_a_preconditioned_network_is_too_little():
    schedule = schedules.EDM(log_time=True)
    with pytest.raises(ValueError, match="kind is not said"):
        Denoiser(members()[0], schedule)
    with pytest.raises(ValueError, match="input_scaling is not said"):
        fastens.Ensemble(members(), prediction="epsilon", aggregate_in="x0", schedule=schedule)


class Preconditioned(nn.Module):
    """The network inside EDM's preconditioning: its output for a denoiser that is known."""

    def __init__(self, denoiser, sigma_data):
        super().__init__()
        self.denoiser, self.sigma_data = denoiser, sigma_data

    def forward(self, x, noise_label):
        sigma = (4 * noise_label.double()).exp()
        d = self.sigma_data
        root = (sigma**2 + d**2).sqrt().view(-1, 1)
        inner = x * root  # c_in is 1 / root
        clean = self.denoiser(inner, sigma)
        return (clean - inner * (d / root) ** 2) * root / (sigma.view(-1, 1) * d)


@pytest.mark.parametrize("method", ["ddim", "euler", "heun"])
def test_a_preconditioned_network_is_sampled_as_its_denoiser(method):
    schedule = schedules.EDM(0.02, 20.0)
    means = [[0.5, -0.3], [-0.6, 0.4]]
    known = MixtureNetwork(schedule, means, 0.2, "x0")
    wrapped = Preconditioned(known, 0.5)
    scheduler = EDMEulerScheduler(sigma_min=0.02, sigma_max=20.0)
    expected, found = (
        Sampler(denoiser, method, steps=9)(5, (2,))
        for denoiser in (Denoiser(known, schedule, "x0"), Denoiser(wrapped, scheduler))
    )
    assert relative_error(found, expected) < 1e-8
    outer, inner = (
        sample(denoiser, 5, (2,), steps=9, clip=None)
        for denoiser in (Denoiser(known, schedule, "x0"), Denoiser(wrapped, scheduler))
    )
    assert relative_error(inner, outer) < 1e-4


# What members and folders say


def test_the_parameterization_of_a_compvis_model_is_read():
    from fastens.interop.k_diffusion import CompVis

    class Latent(Network):
        parameterization = "v"

        def __init__(self):
            super().__init__()
            self.register_buffer("alphas_cumprod", torch.linspace(0.99, 0.01, 10))

        def apply_model(self, x, t, cond):
            return self(x, t)

    networks = [CompVis(Latent()) for _ in range(2)]
    assert Denoiser(fastens.Ensemble(networks), STEPS).prediction.kind == "v"
    with pytest.raises(ValueError, match="'epsilon' by prediction=, but 'v' by parameterization 'v'"):
        fastens.Ensemble(networks, prediction="epsilon")


def test_edm_networks_give_the_data():
    class Precond(Network):
        sigma_min, sigma_max = 0.0, float("inf")

        def round_sigma(self, sigma):
            return sigma

    said = Denoiser(fastens.Ensemble([Precond() for _ in range(2)])).prediction
    assert said == Prediction("x0", schedules.EDM())
    with pytest.raises(ValueError, match="'epsilon' by prediction=, but 'x0' by EDM's networks"):
        fastens.Ensemble([Precond() for _ in range(2)], prediction="epsilon")


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), DDIMScheduler(prediction_type="v_prediction")], ids=repr)
def test_the_evaluation_reads_a_folders_scheduler_as_its_own_class(scheduler, tmp_path):
    from fastens.evaluation.subjects import from_files

    folders = fastens.demo.member_paths("digits")[:2]
    np.save(data := tmp_path / "data.npy", np.zeros((4, 1, 8, 8), np.float32))
    scheduler.save_pretrained(tmp_path / "scheduler")
    ensemble = fastens.Ensemble(folders)
    subject = from_files(ensemble, folders, data, tmp_path / "scheduler", None, 17, None)
    assert subject.prediction == schedules.prediction_of(scheduler)
    with pytest.raises(ValueError, match="by prediction=, but"):
        from_files(ensemble, folders, data, tmp_path / "scheduler", "x0", 17, None)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="expected a scheduler"):
        from_files(ensemble, folders, data, tmp_path / "scheduler", None, 17, None)


def test_flow_networks_whose_pipelines_change_time_or_sign_are_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fastens.interop.diffusers import check_flow_network

    said = schedules.prediction_of(FlowMatchEulerDiscreteScheduler())
    check_flow_network("SD3Transformer2DModel", said)
    check_flow_network("UNet2DConditionModel", said)
    check_flow_network("FluxTransformer2DModel", Prediction("flow", schedules.Flow()))
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel.*schedule=fastens.schedules.Flow"):
        check_flow_network("FluxTransformer2DModel", said)
    tiny = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32,), "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 8}  # fmt: skip

    class Renamed(UNet2DModel):
        pass

    Renamed.__name__ = "FluxLike"
    networks = [Renamed(**tiny) for _ in range(2)]
    options = {"schedule": FlowMatchEulerDiscreteScheduler()}
    plain = fastens.Ensemble(networks, "geometric", **options)  # no conversion, no time to be read
    plain.rule = fastens.rules.NoiseDependentMean(((0.5, 0.5),), (0.0,))
    with pytest.raises(ValueError, match="FluxLike"):
        plain(torch.zeros(1, 3, 8, 8), 400)
    with pytest.raises(ValueError, match="FluxLike"):
        fastens.Ensemble(networks, "geometric", aggregate_in="x0", **options)
    fastens.Ensemble(networks, "geometric", aggregate_in="x0", prediction="flow", schedule=schedules.Flow())
