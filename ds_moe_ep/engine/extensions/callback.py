"""Callbacks of an engine: fixed points of its methods at which what goes along with it may act."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepCall:
    """One call of `engine.step` that has ended."""

    number: int  # optimizer steps before it
    is_boundary: bool  # the last micro-batch of a batch: the optimizer was to step
    is_applied: bool  # it did; an overflow skips it


@dataclass(frozen=True)
class SaveCall:
    """The arguments of one `engine.save_checkpoint`, in DeepSpeed's order."""

    save_dir: str
    tag: Any = None
    client_state: Mapping[str, Any] | None = None
    save_latest: bool = True
    exclude_frozen_parameters: bool = False


LOAD_OPTIONS = (
    "load_module_strict",
    "load_optimizer_states",
    "load_lr_scheduler_states",
    "load_module_only",
    "custom_load_fn",
)


@dataclass(frozen=True)
class LoadCall:
    """The arguments of one `engine.load_checkpoint`; `args` and `kwargs` are what follows the tag."""

    load_dir: str
    tag: str | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that follow the tag, by DeepSpeed's names."""
        return {**dict(zip(LOAD_OPTIONS, self.args, strict=False)), **self.kwargs}

    @property
    def wants_states(self) -> bool:
        """True where optimizer states are to be loaded."""
        options = self.options
        return bool(options.get("load_optimizer_states", True) and not options.get("load_module_only", False))


class EngineCallback:
    """Acts at points of an engine's methods; each method here may be left out.

    Callbacks nest: the first of an engine's tuple is the outermost. What comes before the engine's own method
    (`before_load`, and the first half of whatever is "around" or "on") runs from the first callback to the last, and
    what comes after it (`after_step`, the second half) from the last to the first.
    """

    def around_call(self, method: str) -> AbstractContextManager[object]:
        """A scope around one call of "forward", "backward" or "step", or a pipeline's "train_batch", "eval_batch"."""
        return nullcontext()

    def on_backward(self, loss: Any, proceed: Callable[[Any], Any]) -> Any:
        """Runs the backward pass from a loss by `proceed`, which returns what `engine.backward` returns."""
        return proceed(loss)

    def on_scale(self, loss: Any) -> Any:
        """The loss that `engine.scale` gets in place of this one."""
        return loss

    def clip_gradients(self) -> None:
        """Clips fp32 gradients, in the place of the engine's own clipping."""

    def before_model_step(self) -> None:
        """A batch's gradients are complete, and the optimizer is about to be called."""

    def after_model_step(self, is_applied: bool) -> None:
        """The optimizer was called, and moved the parameters or did not: in `step`, or a pipeline's `train_batch`."""

    def after_step(self, step: StepCall) -> None:
        """The call of `engine.step`, or of a pipeline's `train_batch`, has ended well."""

    def around_save(self, save: SaveCall, proceed: Callable[[SaveCall], Any]) -> Any:
        """Saves a checkpoint by `proceed`, which returns what `engine.save_checkpoint` returns."""
        return proceed(save)

    def before_load(self, load: LoadCall) -> None:
        """Refuses a checkpoint by raising, before any of it is loaded."""

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        """Loads a checkpoint by `proceed`, which returns what `engine.load_checkpoint` returns."""
        return proceed(load)

    def close(self) -> None:
        """Undoes what the callback did to anything but the engine's methods. Local."""
