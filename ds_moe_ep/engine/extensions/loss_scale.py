"""The loss scale of fp16 without ZeRO.

DeepSpeed's wrapper divides gradients by the scale, and no release since 0.18 multiplies the loss with it: steps are
too short by the scale, small gradients underflow, and a clipping limit is never met.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ds_moe_ep.engine import seams, step_seams

SCALES = "moe_ep_scales_losses"  # an engine's attribute: it does already


def scale_losses(engine: Any) -> Callable[[], None]:
    """Makes `engine.backward` and `engine.scale` scale the loss where DeepSpeed does not. Returns what undoes that."""
    if step_seams.scales_loss(engine) or SCALES in vars(engine):
        return lambda: None
    seams.log_rank0(
        "fp16 without ZeRO: the loss is multiplied with the loss scale, which DeepSpeed divides gradients by"
    )
    before = {name: vars(engine)[name] for name in ("backward", "scale") if name in vars(engine)}
    backward, scale = engine.backward, engine.scale

    @functools.wraps(backward)
    def backward_scaled(loss: Any, *args: Any, **kwargs: Any) -> Any:
        factor = engine.optimizer.loss_scale
        return backward(loss.float() * factor, *args, **kwargs) / factor

    @functools.wraps(scale)
    def scale_loss(loss: Any) -> Any:
        return scale(loss.float() * engine.optimizer.loss_scale)

    def undo() -> None:
        for name in ("backward", "scale", SCALES):
            vars(engine).pop(name, None)
        vars(engine).update(before)

    engine.backward, engine.scale = backward_scaled, scale_loss
    setattr(engine, SCALES, True)
    return undo
