"""The order of files: those that take longest first, so that no worker is left with one of them at the end."""

from collections import Counter
from pathlib import Path

# Files whose tests are few for the time that they take, about so many seconds.
SECONDS = {
    "atlas/test_atlas.py": 80,
    "composition/test_report.py": 25,
    "composition/test_superpose.py": 50,
    "demo/test_demo.py": 15,
    "distributed/test_distribute.py": 90,
    "distributed/test_faults.py": 60,
    "distributed/test_launchers.py": 60,
    "evaluation/test_classes.py": 20,
    "evaluation/test_report.py": 40,
    "fold/test_compiled.py": 90,
    "fold/test_compiled_states.py": 15,
    "fold/test_launch_counts.py": 40,
    "fold/test_launches.py": 40,
    "fold/test_plan_masks.py": 20,
    "fold/test_plans.py": 60,
    "fold/test_replays.py": 20,
    "fuzz/test_assigned.py": 25,
    "fuzz/test_fuzz.py": 40,
    "interop/test_diffusers_families.py": 20,
    "kernels/test_ahead_of_time.py": 120,
    "kernels/test_code_of_plans.py": 70,
    "kernels/test_cuda_library.py": 100,
    "kernels/test_cuda_on_host.py": 20,
    "kernels/test_emulated.py": 45,
    "ops/test_conv2d.py": 60,
    "ops/test_tma_ways.py": 60,
    "tabular/test_forest_diffusion.py": 30,
}
OF_ONE_TEST = 0.08  # seconds, of other files


def longest_first(items):
    """Sort collected tests so: the files that take longest, as far as is known, before the others."""
    tests = Counter(item.path for item in items)
    seconds = {Path(__file__).parent / name: time for name, time in SECONDS.items()}
    items.sort(key=lambda item: -seconds.get(item.path, OF_ONE_TEST * tests[item.path]))
