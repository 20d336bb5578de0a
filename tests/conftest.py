"""What tests share: two small members in folders, and the choice of the interpreter.

Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before triton is imported.
"""

from tests import interpreter

interpreter.choose()

import pytest  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of two small diffusers U-Nets, for commands."""
    from tests.networks import randomised, unet_2d

    root = tmp_path_factory.mktemp("members")
    for seed in range(2):
        randomised(lambda: unet_2d(False), seed).save_pretrained(root / f"member_{seed}")
    return [str(root / f"member_{seed}") for seed in range(2)]
