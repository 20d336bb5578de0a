"""What tests share: two small members in folders, samples of products, and the choice of the interpreter.

Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before triton is imported.
"""

import gc

gc.disable()  # while modules are imported and tests collected, all of which stays

from tests import interpreter  # noqa: E402

interpreter.choose()

import itertools  # noqa: E402
import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.covering import covering  # noqa: E402
from tests.left_behind import settings  # noqa: E402
from tests.longest_first import longest_first  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as ``full`` what a test's ``covering(strength)`` sample leaves out of the product of its parameters."""
    for _, group in itertools.groupby(items, key=lambda item: (item.parent, getattr(item, "originalname", None))):
        tests = list(group)
        mark = tests[0].get_closest_marker("covering")
        if mark:
            chosen = covering([tuple(map(id, test.callspec.params.values())) for test in tests], *mark.args)
            for number in set(range(len(tests))).difference(chosen):
                tests[number].add_marker("full")
    longest_first(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Begin every test, fixtures included, with the same random numbers, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give workers whole files."""
    from tests.by_file import ByFile

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was():
    """Fail the test that changed a setting of the process, and not one that happens to run after it."""
    before = settings()
    yield
    after = settings()
    assert after == before, {name: (before[name], after[name]) for name in before if after[name] != before[name]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of two small diffusers U-Nets, for commands."""
    from tests.networks import randomised, small_unet

    root = tmp_path_factory.mktemp("members")
    for seed in range(2):
        randomised(small_unet, seed).save_pretrained(root / f"member_{seed}")
    return [str(root / f"member_{seed}") for seed in range(2)]


def pytest_collection_finish():
    """Leave what was imported and collected out of every garbage collection to come."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)  # what tests import stays too, and was looked through a tenth of the time
    gc.enable()
