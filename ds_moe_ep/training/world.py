"""How a process of a training run joins the others, by whichever launcher it was started."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_moe_ep
from ds_moe_ep.engine.seams import gather

Result = TypeVar("Result")


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


def load_weights(engine: Any, args: argparse.Namespace) -> None:
    """Loads the run that --resume names, or the weights that --weights names, whose folders were looked at before."""
    if args.resume:
        engine.load_checkpoint(args.resume)
    if args.weights:
        engine.load_checkpoint(args.weights, load_module_only=True)


def agreed(action: Callable[[], Result]) -> Result:
    """Result of `action()` on this rank; the same ConfigError on every rank where it fails on one. Collective."""
    result, problem = None, ""
    try:
        result = action()
    except (ds_moe_ep.MoEError, OSError) as error:
        problem = str(error)
    problems = gather(problem)
    first = next(filter(None, problems), "")
    if first:
        having = [str(rank) for rank, its in enumerate(problems) if its]
        where = f" (ranks {', '.join(having)})" if len(having) < len(problems) else ""
        raise ds_moe_ep.ConfigError(first + where)
    assert result is not None
    return result


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number over all ranks. Collective, and the step's only one beside the loss's."""
    numbers = torch.tensor(list(values), device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return [float(number) for number in numbers]
