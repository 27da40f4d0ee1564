"""Supervision of an engine: the watch hears which step runs, and says why a collective of DeepSpeed's failed.

DeepSpeed reduces gradients and agrees on overflows in collectives of its own. When a rank dies there, the communicator
says that a connection was closed, and not whose.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.errors import MoEError, PeerError
from ds_moe_ep.health.secondary_failures import is_secondary_message
from ds_moe_ep.health.watch import Watch

_COLLECTIVES = ("deepspeed.comm", "torch.distributed")


class Supervision(EngineCallback):
    """Tells the watch of steps and calls, and names the cause of a failed collective of DeepSpeed's.

    Its error becomes a PeerError that says which rank is gone, stopped or failed first.
    """

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine, self._watch = engine, watch

    @contextmanager
    def around_call(self, method: str) -> Iterator[None]:
        engine, watch, step = self._engine, self._watch, self._engine.global_steps
        is_step = method == "train_batch" or (method != "eval_batch" and engine.module.training)
        if is_step and torch.is_grad_enabled():
            watch.step_begins(step)
        try:
            with watch.among_others(f"step {step}"):
                yield
        except BaseException as error:
            watch.step_ends(is_done=False)
            if isinstance(error, MoEError) or not is_collective(error):
                raise
            raise explained(error, f"engine.{method}, step {step}", watch) from error
        if method in ("step", "train_batch"):
            watch.step_ends()

    def close(self) -> None:
        self._watch.step_ends(is_done=False)  # one that nobody ended


def explained(error: BaseException, where: str, watch: Watch) -> PeerError:
    """The error of a collective with the causes that the watch knows. May take seconds."""
    text = f"{where}: a collective of DeepSpeed's failed on rank {dist.get_rank()} ({first_line(error)})"
    return PeerError(f"{text}; {cause(watch)}")


def cause(watch: Watch) -> str:
    """The cause as the watch knows it from the other ranks, or where to look. May take seconds."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    return watch.explain(others) or "look for the first error of another rank"


def is_collective(error: BaseException) -> bool:
    """True where an error came out of a collective, and so from another rank's end or silence.

    One that was begun and is waited for later has no frame of its own: its communicator's words tell.
    """
    frames = traceback.walk_tb(error.__traceback__)
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    if is_secondary_message(str(error)):
        return True
    return any(str(frame.f_globals.get("__name__", "")).startswith(_COLLECTIVES) for frame, _ in frames)


def first_line(error: BaseException) -> str:
    """The first line of an error, without a communicator's place in its source and its advice."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". This is ")[0][:300]
