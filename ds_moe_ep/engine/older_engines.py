"""Faults of DeepSpeed 0.17 and 0.18 in a step: mended, or refused by name."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ds_moe_ep.config.deepspeed_keys import number_of
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.errors import EngineError


class OlderEngine(EngineCallback):
    """Makes an older engine step as 0.19.8's does, by its optimizer's methods.

    1. ZeRO-2 of 0.17 keeps the last micro-batch of a step alone: refused.
    2. ZeRO-1 of 0.17 does not agree on an overflow: a rank that saw none waits in the norm for those that skip.
    3. ZeRO of 0.18 gathers the parameters in place while gradients are recorded, which torch 2.13 refuses.
    """

    def __init__(self, engine: Any) -> None:
        refuse_lost_micro_batches(engine)
        self._optimizer = optimizer = engine.optimizer
        check_overflow, step = getattr(optimizer, "check_overflow", None), optimizer.step

        @functools.wraps(step)
        def step_without_gradients(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return step(*args, **kwargs)

        optimizer.step = step_without_gradients
        if check_overflow is not None:
            optimizer.check_overflow = lambda partition_gradients=True: check_overflow(True)

    @staticmethod
    def is_needed(engine: Any) -> bool:
        """True for ZeRO of DeepSpeed below 0.19."""
        return number_of(seams.release()) < (0, 19) and bool(engine.zero_optimization())

    def close(self) -> None:
        for name in ("check_overflow", "step"):
            vars(self._optimizer).pop(name, None)


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
