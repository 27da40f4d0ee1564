"""Which ranks had a loss or gradients that are not finite, when DeepSpeed skips a step for it.

DeepSpeed finds an overflow after the reduction, when a NaN of one rank is in the gradients of all. So each gradient is
summed up before it: one small op per parameter, and no device sync unless a step is skipped.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, StepCall


@dataclass(frozen=True)
class NonfiniteFindings:
    """Findings of a rank in its own backward passes of a step."""

    is_loss_bad: bool
    bad_names: tuple[str, ...]  # parameters, in the model's order


class Sums:
    """The sums of a rank's losses and gradients since the last step: not finite where one number was not."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._losses: list[Tensor] = []
        self._gradients: list[tuple[int, Tensor]] = []
        self._handles = []
        for index, name in enumerate(self._names):
            parameter = model.get_parameter(name)
            self._handles.append(parameter.register_hook(functools.partial(self._add, index, parameter)))

    def end(self) -> None:
        """Takes the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def _add(self, index: int, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:  # of a function that adds it to the parameter's by itself, as Megatron-DeepSpeed's do
            gradient = parameter.grad
        if gradient is not None:
            self._gradients.append((index, gradient.sum(dtype=torch.float32)))

    def add_loss(self, loss: Any) -> None:
        """Adds the loss of a micro-batch."""
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().sum(dtype=torch.float32))

    def restart(self) -> None:
        """Forgets what was added."""
        self._losses.clear()
        self._gradients.clear()

    def findings(self) -> NonfiniteFindings:
        """The loss and the gradients that are not finite. Syncs the device."""
        bad = {index for index, total in self._gradients if not total.isfinite()}
        names = tuple(name for index, name in enumerate(self._names) if index in bad)
        return NonfiniteFindings(any(not bool(loss.isfinite()) for loss in self._losses), names)


class SkippedSteps(EngineCallback):
    """Tells in one line of rank 0 whose step was skipped. Collective where one was.

    Of use where DeepSpeed looks for overflows: not in fp32 without ZeRO.
    """

    def __init__(self, engine: Any) -> None:
        self._sums = Sums(engine.module)

    def on_backward(self, loss: Any, proceed: Callable[[Any], Any]) -> Any:
        self._sums.add_loss(loss)
        return proceed(loss)

    def after_step(self, step: StepCall) -> None:
        if not step.is_boundary:
            return
        if not step.is_applied:
            found = summary(seams.gather(self._sums.findings()))
            seams.log_rank0(f"step {step.number} was skipped: {found}", logging.WARNING)
        self._sums.restart()

    def close(self) -> None:
        self._sums.end()


def summary(by_rank: Sequence[NonfiniteFindings]) -> str:
    """The ranks with a bad loss, and those with bad gradients; of each the parameter next to the loss."""
    losses = [str(rank) for rank, found in enumerate(by_rank) if found.is_loss_bad]
    gradients = [
        f"{rank} ({len(found.bad_names)} of them, next to the loss {found.bad_names[-1]})"
        for rank, found in enumerate(by_rank)
        if found.bad_names
    ]
    parts = [f"the loss is not finite on ranks {', '.join(losses)}"] if losses else []
    parts += [f"gradients are not finite on ranks {', '.join(gradients)}"] if gradients else []
    return "; ".join(parts) or "each rank's own gradients are finite, their sum is not"
