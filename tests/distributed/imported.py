"""What ranks use, imported in the one process that they are all forked from."""

import gc
import os

import diffusers
import torch
import torch.distributed.checkpoint
import torchdiffeq  # noqa: F401
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel  # noqa: F401

import fastens.cli
import fastens.evaluation.likelihood
import fastens.interop.diffusers
import fastens.plan.lowering.registry
import fastens.runs
import fastens.uncertainty.plots  # noqa: F401
from tests.distributed import kind_cases, ranks  # noqa: F401

PROCESS = os.getpid()
torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
# Pages of what is collected by no rank are written by none, and so are not copied.
gc.collect()
gc.freeze()
