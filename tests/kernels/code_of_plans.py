"""Every kernel that a score network's plan launches, compiled and read, which takes minutes: ``make test-gpu-code``."""

import pytest

from bench.gpu_launches import convolutions, recorded
from bench.score_networks import NETWORKS
from tests.kernels.test_ahead_of_time import needs_triton
from tests.kernels.test_code_of_plans import check, read_rows

BATCHES = (1, 16, 256)


@needs_triton
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_of_every_convolution(name, batch):
    rows = read_rows(name, str(batch))
    assert {row["convolution"] for row in rows} == set(map(str, convolutions(name)))
    for row in rows:
        check(row)


@needs_triton
def test_products_of_float32_in_tf32():
    for row in read_rows("songunet", "16", "--dtype", "float32", "--sample", "3"):
        check(row, itemsize=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_launch_what_is_written_down(name):
    """Where this fails, ``python -m bench.gpu_launches`` writes down what they launch now."""
    now = {tuple(sorted(row.items())) for row in recorded(name)["convolutions"]}
    from bench import gpu_launches

    written = gpu_launches.json.loads(gpu_launches.FILE.read_text())[name]["convolutions"]
    assert {tuple(sorted(row.items())) for row in written} == now
