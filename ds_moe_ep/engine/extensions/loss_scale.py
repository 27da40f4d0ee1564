"""The loss scale of fp16 without ZeRO.

DeepSpeed's wrapper divides gradients by the scale, and no release since 0.18 multiplies the loss with it: steps are
too short by the scale, small gradients underflow, and a clipping limit is never met.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback


class LossScale(EngineCallback):
    """Multiplies the loss with the loss scale in `engine.backward` and `engine.scale`, where DeepSpeed does not."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        seams.log_rank0(
            "fp16 without ZeRO: the loss is multiplied with the loss scale, which DeepSpeed divides gradients by"
        )

    def on_backward(self, loss: Any, proceed: Callable[[Any], Any]) -> Any:
        factor = self._optimizer.loss_scale
        return proceed(loss.float() * factor) / factor

    def on_scale(self, loss: Any) -> Any:
        return loss.float() * self._optimizer.loss_scale
