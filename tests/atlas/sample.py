"""The networks that ``make test`` compares; ``make atlas`` compares all."""

import functools
import warnings

import torch

from tests.atlas.compare import Counting, members_of
from tests.atlas.registry import NETWORKS, Network, arguments, load

# Each calls a torch function that those before it do not, and together they call all that the atlas does.
COVER = """
    video_unet_3d z_image hidream imagen_unet_3d t5_film edm2 ace_step consisid edm_adm mdlm azula_unet csdi
    mochi qwen_image diffusion_policy egnn_network equivariant_diffusion lumina_2 rectified_flow_unet sedd
    wan_vace adm azula_vit cfm_mlp edm_ncsnpp hunyuan_video k_image_transformer_v1 k_image_v1 longcat_audio
    ltx_2 monai_spade_unet unet_i2vgen_xl unet_stable_cascade
""".split()


def sample() -> list[str]:
    """The cover, and every network that is looped or has no plan."""
    return [name for name, entry in load().items() if name in COVER or entry.looped or entry.unplanned]


@functools.cache
def functions(entry: Network) -> set[str]:
    """The torch functions that a member calls; none where its package is missing."""
    try:
        make, given = entry.build()
    except ImportError:
        return set()
    (member,), (args, kwargs) = members_of(make, 1), arguments(given, 2, 0)
    with warnings.catch_warnings(), torch.no_grad(), Counting() as counting:
        warnings.simplefilter("ignore")
        member(*args, **kwargs)
    return {name for name, count in counting.calls.items() if count}


def uncovered(names: list[str]) -> list[str]:
    """Networks that call what none of ``names`` does, the most such functions first, until nothing is left."""
    called = {name: functions(entry) for name, entry in NETWORKS.items()}
    left, found = set().union(*called.values()).difference(*(called[name] for name in names)), []
    while left:
        found.append(max(called, key=lambda name: len(called[name] & left)))
        left -= called[found[-1]]
    return found
