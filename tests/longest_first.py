"""The order of files: those that take longest first, so that no worker is left with one of them at the end."""

from collections import Counter
from pathlib import Path

# Files whose tests are few for the time that they take, about so many seconds.
SECONDS = {
    "atlas/test_atlas.py": 90,
    "composition/test_report.py": 15,
    "composition/test_superpose.py": 40,
    "demo/test_demo.py": 25,
    "distributed/test_distribute.py": 90,
    "distributed/test_faults.py": 20,
    "distributed/test_launchers.py": 10,
    "evaluation/test_classes.py": 20,
    "evaluation/test_merging.py": 25,
    "evaluation/test_report.py": 65,
    "fold/test_compiled.py": 60,
    "fold/test_compiled_states.py": 15,
    "fold/test_higher_order.py": 15,
    "fold/test_launch_counts.py": 25,
    "fold/test_launches.py": 20,
    "fold/test_plan_masks.py": 20,
    "fold/test_plans.py": 20,
    "fold/test_recurrent.py": 10,
    "fold/test_replays.py": 20,
    "fuzz/test_assigned.py": 25,
    "fuzz/test_fuzz.py": 40,
    "interop/test_denoising_diffusion_pytorch.py": 10,
    "interop/test_diffusers_families.py": 20,
    "interop/test_guidance.py": 15,
    "kernels/test_ahead_of_time.py": 120,
    "kernels/test_code_of_plans.py": 70,
    "kernels/test_cuda_library.py": 100,
    "kernels/test_cuda_on_host.py": 20,
    "kernels/test_emulated.py": 45,
    "ops/test_conv2d.py": 30,
    "ops/test_tma_ways.py": 25,
    "plan/test_graph.py": 20,
    "tabular/test_forest_diffusion.py": 30,
    "tabular/test_forest_threads.py": 15,
    "test_distillation.py": 20,
    "test_schedulers_at_random.py": 12,
}
OF_ONE_TEST = 0.08  # seconds, of other files


def longest_first(items):
    """Sort collected tests so: the files that take longest, as far as is known, before the others."""
    tests = Counter(item.path for item in items)
    seconds = {Path(__file__).parent / name: time for name, time in SECONDS.items()}
    items.sort(key=lambda item: -seconds.get(item.path, OF_ONE_TEST * tests[item.path]))
