"""The gradient norm that clips: every parameter counts once, on whichever ranks it lies.

Without ZeRO, DeepSpeed's norm is not whole. In fp32 each rank takes that of its own experts and the ranks' norms are
averaged; the wrappers of fp16 and bf16 leave the experts out, or count a rank's own. ZeRO's optimizers count all, once.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.engine.layouts.reductions import num_holders

EPSILON = 1e-6  # DeepSpeed's, beside the norm


def clipping_for(engine: Any) -> GradientClipping | WrapperClipping | None:
    """The callback that clips by the norm over all ranks' experts; None where DeepSpeed's norm is whole."""
    kind = step_seams.clipping_of(engine)
    if kind == "whole":
        return None
    are_apart = any(num_holders(parameter) < dist.get_world_size() for parameter in engine.module.parameters())
    if engine.gradient_clipping() > 0 and (are_apart or kind == "wrapper"):
        seams.log_rank0(
            f"gradient_clipping={engine.gradient_clipping()}: the norm that clips counts the experts of all ranks; "
            "without ZeRO, DeepSpeed's own does not, and its steps differ",
            logging.WARNING,
        )
    return GradientClipping(engine) if kind == "gradients" else WrapperClipping(engine)


def whole_norm(parameters: Iterable[nn.Parameter], device: torch.device | str) -> Tensor:
    """The 2-norm [] of all gradients of a model that lies on all ranks, in fp32 and alike on every rank.

    Collective over the world: one all-reduce, no device sync.
    """
    norms: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            norms[num_holders(parameter)].append(norm)
    norms.pop(0, None)
    total = torch.zeros((), device=device)
    for holders, theirs in norms.items():  # each holder gives its share, so that the ranks' sum has each once
        total += torch.stack(theirs).square().sum() / holders
    dist.all_reduce(total)
    return total.sqrt()


class GradientClipping(EngineCallback):
    """fp32: scales the gradients themselves, and reports the norm as the engine's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @torch.no_grad()
    def clip_gradients(self) -> None:
        engine = self._engine
        parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = whole_norm(parameters, engine.device)
        coefficient = (engine.gradient_clipping() / (norm + EPSILON)).clamp(max=1.0)
        for parameter in parameters:
            parameter.grad.mul_(coefficient)
        step_seams.report_norm(engine, norm)


class WrapperClipping(EngineCallback):
    """fp16 and bf16: gives the optimizer's wrapper the whole norm, by which and the loss scale it divides."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = optimizer = engine.optimizer
        self._before = {name: vars(optimizer)[name] for name in step_seams.WRAPPER_NAMES if name in vars(optimizer)}
        take_step, unscale = optimizer.step, optimizer.unscale_and_clip_grads
        norms: list[float] = []  # of the step that runs, with the loss scale

        @functools.wraps(take_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            scale = optimizer.loss_scale or 1.0  # bf16 may have none
            norms.append(float(whole_norm(engine.module.parameters(), engine.device)))
            try:
                result = take_step(*args, **kwargs)
                if not optimizer.overflow:
                    step_seams.report_norm(optimizer, norms[-1] / scale)
            finally:
                norms.clear()
            return result

        @functools.wraps(unscale)
        def unscale_by_whole_norm(*args: Any, **kwargs: Any) -> Any:
            return unscale(*args[:-1], norms[-1], **kwargs)  # the norm is the last that DeepSpeed gives by position

        optimizer.step, optimizer.unscale_and_clip_grads = step, unscale_by_whole_norm

    def close(self) -> None:
        for name in step_seams.WRAPPER_NAMES:
            vars(self._optimizer).pop(name, None)
        vars(self._optimizer).update(self._before)
