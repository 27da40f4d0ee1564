"""What the watch and the engine tell each other: which step runs, and why a collective of DeepSpeed's failed.

DeepSpeed reduces gradients and agrees on overflows in collectives of its own. When a rank dies there, the communicator
says that a connection was closed, and not whose.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.errors import MoEError, PeerError
from ds_moe_ep.health.watch import Watch

METHODS = ("forward", "backward", "step")
_COLLECTIVES = ("deepspeed.comm", "torch.distributed")


def supervise(engine: Any, watch: Watch) -> None:
    """Wraps the engine's forward, backward and step: the watch hears of steps and calls, and errors name causes.

    A failed collective of DeepSpeed's becomes a PeerError that says which rank is gone, stopped or failed first.
    """
    for name in METHODS:
        setattr(engine, name, _supervised(engine, name, watch))


def _supervised(engine: Any, name: str, watch: Watch) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(engine, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        step = engine.global_steps
        if engine.module.training and torch.is_grad_enabled():
            watch.step_begins(step)
        try:
            with watch.among_others(f"step {step}"):
                result = method(*args, **kwargs)
        except BaseException as error:
            watch.step_ends(is_done=False)
            if isinstance(error, MoEError) or not is_collective(error):
                raise
            raise explained(error, f"engine.{name}, step {step}", watch) from error
        if name == "step":
            watch.step_ends()
        return result

    return call


def explained(error: BaseException, where: str, watch: Watch) -> PeerError:
    """The error of a collective with what the watch knows. May take seconds."""
    text = f"{where}: a collective of DeepSpeed's failed on rank {dist.get_rank()} ({first_line(error)})"
    return PeerError(f"{text}; {cause(watch)}")


def cause(watch: Watch) -> str:
    """What the watch knows of the other ranks, or where to look. May take seconds."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    return watch.explain(others) or "look for the first error of another rank"


def is_collective(error: BaseException) -> bool:
    """Whether an error came out of a collective, and so from another rank's end or silence."""
    frames = traceback.walk_tb(error.__traceback__)
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return any(str(frame.f_globals.get("__name__", "")).startswith(_COLLECTIVES) for frame, _ in frames)


def first_line(error: BaseException) -> str:
    """What an error says, without a communicator's place in its source and its advice."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". This is ")[0][:300]
