"""One wrapper for each method of an engine, over its callbacks in one order.

An engine has at most one `EngineExtensions`. A method is wrapped once, when the first callback that acts there is
installed, and gets its original back when the last one goes. Everything else is in the callbacks (`callback.py`) and
their order (`order.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from ds_moe_ep.engine import step_seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall, SaveCall, StepCall
from ds_moe_ep.engine.extensions.order import ORDER

ATTRIBUTE = "moe_ep_extensions"  # of the engine
_UNSET = object()

# The engine's methods, and the points of callbacks for which each is wrapped.
METHODS: dict[str, tuple[str, ...]] = {
    "forward": ("around_call",),
    "backward": ("around_call", "on_backward"),
    "scale": ("on_scale",),
    "step": ("around_call", "after_step"),
    "train_batch": ("around_call", "after_step"),  # of a pipeline's engine, as the next
    "eval_batch": ("around_call",),
    step_seams.CLIP_GRADIENTS: ("clip_gradients",),
    step_seams.TAKE_MODEL_STEP: ("before_model_step", "after_model_step"),
    "save_checkpoint": ("around_save",),
    "load_checkpoint": ("before_load", "around_load"),
}


class EngineExtensions:
    """The callbacks of one engine. Local, but for what the callbacks do; every rank installs the same."""

    def __init__(self, engine: Any) -> None:
        self.callbacks: tuple[EngineCallback, ...] = ()
        self._engine = engine
        self._before: dict[str, object] = {}  # of each wrapped method: what the engine's own attributes had there

    @classmethod
    def of(cls, engine: Any) -> EngineExtensions:
        """Those of the engine, or empty ones."""
        found: EngineExtensions = vars(engine).get(ATTRIBUTE) or cls(engine)
        return found

    def has(self, kind: type[EngineCallback]) -> bool:
        """True where a callback of that class is installed."""
        return any(type(callback) is kind for callback in self.callbacks)

    def install(self, callbacks: Iterable[EngineCallback]) -> None:
        """Adds callbacks, each at its place in the order."""
        added = list(callbacks)
        twice = [type(callback).__name__ for callback in added if self.has(type(callback))]
        assert not twice, f"{twice} would act twice in one call"
        self._take([*self.callbacks, *added])

    def uninstall(self, callbacks: Sequence[EngineCallback]) -> None:
        """Takes callbacks away and closes them, the last one first.

        A method that no other callback needs gets its original back; a wrapper that somebody else put on it meanwhile
        goes with ours.
        """
        self._take([callback for callback in self.callbacks if callback not in callbacks])
        for callback in reversed(callbacks):
            callback.close()

    def _take(self, callbacks: Sequence[EngineCallback]) -> None:
        self.callbacks = tuple(sorted(callbacks, key=lambda callback: ORDER.index(type(callback))))
        own = vars(self._engine)
        for name, points in METHODS.items():
            is_needed = hasattr(self._engine, name) and any(self._acting(point) for point in points)
            if is_needed and name not in self._before:
                self._before[name] = own.get(name, _UNSET)
                own[name] = self._wrapped(name, getattr(self._engine, name))
            elif not is_needed and name in self._before:
                own.pop(name, None)
                before = self._before.pop(name)
                own.update({} if before is _UNSET else {name: before})
        if self.callbacks:
            own[ATTRIBUTE] = self
        else:
            own.pop(ATTRIBUTE, None)

    def _acting(self, point: str) -> list[EngineCallback]:
        """The callbacks that do something at a point, the outermost first."""
        default = getattr(EngineCallback, point)
        return [callback for callback in self.callbacks if getattr(type(callback), point) is not default]

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        wrap: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
            "backward": self._backward,
            "scale": self._scale,
            "step": self._step,
            "train_batch": self._train_batch,
            "eval_batch": self._eval_batch,
            step_seams.CLIP_GRADIENTS: self._clip_gradients,
            step_seams.TAKE_MODEL_STEP: self._take_model_step,
            "save_checkpoint": self._save,
            "load_checkpoint": self._load,
        }
        return functools.wraps(original)(wrap.get(name, self._forward)(original))

    def _around_call(self, method: str) -> ExitStack:
        """The scopes of all callbacks around one call, opened."""
        with ExitStack() as scopes:
            for callback in self._acting("around_call"):
                scopes.enter_context(callback.around_call(method))
            return scopes.pop_all()

    def _nested(self, point: str, innermost: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The callbacks at a point around each other, and around the engine's own method."""
        proceed = innermost
        for callback in reversed(self._acting(point)):
            proceed = partial(getattr(callback, point), proceed=proceed)
        return proceed

    def _forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._around_call("forward"):
                return original(*args, **kwargs)

        return forward

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            with self._around_call("backward"):
                return self._nested("on_backward", lambda loss: original(loss, *args, **kwargs))(loss)

        return backward

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(loss: Any) -> Any:
            for callback in self._acting("on_scale"):
                loss = callback.on_scale(loss)
            return original(loss)

        return scale

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        engine = self._engine

        def step(*args: Any, **kwargs: Any) -> Any:
            with self._around_call("step"):
                # Both are asked before: the engine's step moves on to the next.
                number, is_boundary = engine.global_steps, engine.is_gradient_accumulation_boundary()
                result = original(*args, **kwargs)
                done = StepCall(number, is_boundary, engine.was_step_applied())
                for callback in reversed(self._acting("after_step")):
                    callback.after_step(done)
                return result

        return step

    def _train_batch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        engine = self._engine

        def train_batch(*args: Any, **kwargs: Any) -> Any:
            with self._around_call("train_batch"):
                number = engine.global_steps
                result = original(*args, **kwargs)
                done = StepCall(number, True, engine.was_step_applied())
                for callback in reversed(self._acting("after_step")):
                    callback.after_step(done)
                return result

        return train_batch

    def _eval_batch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def eval_batch(*args: Any, **kwargs: Any) -> Any:
            with self._around_call("eval_batch"):
                return original(*args, **kwargs)

        return eval_batch

    def _clip_gradients(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip_gradients() -> None:
            for callback in self._acting("clip_gradients"):
                callback.clip_gradients()

        return clip_gradients

    def _take_model_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def report(is_applied: bool) -> None:
            for callback in reversed(self._acting("after_model_step")):
                callback.after_model_step(is_applied)

        take = step_seams.reporting_model_step(self._engine, original, report)

        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            for callback in self._acting("before_model_step"):
                callback.before_model_step()
            return take(*args, **kwargs)

        return take_model_step

    def _save(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def proceed(save: SaveCall) -> Any:
            others = (save.save_latest, save.exclude_frozen_parameters)
            return original(save.save_dir, save.tag, dict(save.client_state or {}), *others)

        def save_checkpoint(
            save_dir: str,
            tag: Any = None,
            client_state: Any = None,
            save_latest: bool = True,
            exclude_frozen_parameters: bool = False,
        ) -> Any:
            save = SaveCall(save_dir, tag, client_state, save_latest, exclude_frozen_parameters)
            return self._nested("around_save", proceed)(save)

        return save_checkpoint

    def _load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
            load = LoadCall(load_dir, tag, args, kwargs)
            for callback in self._acting("before_load"):
                callback.before_load(load)
            return self._nested(
                "around_load", lambda load: original(load.load_dir, load.tag, *load.args, **load.kwargs)
            )(load)

        return load_checkpoint
