"""The state of a learning rate's scheduler is compared with the scheduler that will take it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from ds_moe_ep.errors import EngineError

_AWAY = "load_checkpoint(..., load_lr_scheduler_states=False)"
_OF_RELEASES = ("verbose",)  # torch's schedulers had it once


def check_scheduler(path: Path, scheduler: Any, saved: Any) -> None:
    """Raises EngineError where `saved` is not the state of such a scheduler, over as many parameter groups.

    torch's schedulers take any state: one of another kind would leave them with the values that they were made with.
    A class that is not torch's or DeepSpeed's says itself what it loads.
    """
    if saved is None:
        raise EngineError(f"{path}: has no state of a learning rate's scheduler, and this engine has one; {_AWAY}")
    is_known = isinstance(scheduler, LRScheduler) or type(scheduler).__module__.startswith("deepspeed.")
    if not is_known:
        return
    kind = type(scheduler).__name__
    if not isinstance(saved, Mapping):
        raise EngineError(
            f"{path}: has a {type(saved).__name__} as the scheduler's state; take another copy, or {_AWAY}"
        )
    here = scheduler.state_dict()
    theirs, own = ({name for name in each if not name.startswith("_")} - {*_OF_RELEASES} for each in (saved, here))
    if theirs != own:
        odd = sorted(theirs ^ own)[0]
        side = "has" if odd in theirs else "lacks"
        raise EngineError(
            f"{path}: its scheduler's state {side} {odd}, and this run's {kind} does{' not' * (odd in theirs)}: "
            f"another scheduler was saved; give that one, or {_AWAY}"
        )
    for name, value in here.items():
        there = saved.get(name)
        if isinstance(value, list | tuple) and isinstance(there, list | tuple) and len(there) != len(value):
            raise EngineError(
                f"{path}: the scheduler's {name} has {len(there)} values there and {len(value)} here, one per "
                f"parameter group; give the groups that were saved, or {_AWAY}"
            )
