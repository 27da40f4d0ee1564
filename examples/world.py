"""How a process of a training run joins the others, by whichever launcher it was started."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_moe_ep


def set_up_process() -> None:
    """Joins the world (found from the launcher or from MPI) and takes this rank's device."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    ds_moe_ep.init_distributed(verbose=False)
    if dist.get_rank() > 0:
        deepspeed.utils.logger.setLevel(logging.ERROR)  # rank 0 warns for all
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = False
