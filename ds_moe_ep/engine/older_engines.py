"""What engines of DeepSpeed 0.17 and 0.18 do wrong in a step: mended, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ds_moe_ep.config.deepspeed_keys import number_of
from ds_moe_ep.engine import seams
from ds_moe_ep.errors import EngineError


def mend_older(engine: Any) -> Callable[[], None]:
    """Makes an older engine step as 0.19.8's does. Local; returns what undoes that. Does nothing on 0.19.

    1. ZeRO-2 of 0.17 keeps the last micro-batch of a step alone: refused.
    2. ZeRO-1 of 0.17 does not agree on an overflow: a rank that saw none waits in the norm for those that skip.
    3. ZeRO of 0.18 gathers the parameters in place while gradients are recorded, which torch 2.13 refuses.
    """
    optimizer = engine.optimizer
    if number_of(seams.release()) >= (0, 19) or not engine.zero_optimization() or "check_overflow" in vars(optimizer):
        return lambda: None
    refuse_lost_micro_batches(engine)
    check_overflow, step = getattr(optimizer, "check_overflow", None), optimizer.step

    @functools.wraps(step)
    def step_without_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return step(*args, **kwargs)

    optimizer.step = step_without_gradients
    if check_overflow is not None:
        optimizer.check_overflow = lambda partition_gradients=True: check_overflow(True)

    def undo() -> None:
        for name in ("check_overflow", "step"):
            vars(optimizer).pop(name, None)

    return undo


def refuse_lost_micro_batches(engine: Any) -> None:
    """Raises EngineError where ZeRO-2 of DeepSpeed 0.17 would train on the last micro-batch of each step alone."""
    steps = engine.gradient_accumulation_steps()
    is_lost = engine.zero_optimization_stage() == 2 and steps > 1 and not engine.optimizer.cpu_offload
    if is_lost and number_of(seams.release()) < (0, 18):
        raise EngineError(
            f"gradient_accumulation_steps={steps} with zero_optimization.stage=2: ZeRO-2 of DeepSpeed "
            f"{seams.release()} keeps the last micro-batch's gradients alone; use stage 1, or pip install "
            "'deepspeed>=0.18.9'"
        )
