"""How a process of a training run joins the others, by whichever launcher it was started."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from typing import Any

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


def start_from(engine: Any, args: argparse.Namespace) -> None:
    """Loads the run that --resume names, or the weights that --weights names; ends the run where there are none."""
    if args.resume and engine.load_checkpoint(args.resume)[0] is None:
        raise SystemExit(f"--resume {args.resume}: no DeepSpeed checkpoint there; name the folder given to --save")
    if args.weights and engine.load_checkpoint(args.weights, load_module_only=True)[0] is None:
        raise SystemExit(f"--weights {args.weights}: no DeepSpeed checkpoint there; name a folder that --save wrote")
