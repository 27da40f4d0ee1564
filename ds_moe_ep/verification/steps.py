"""Steps of an engine under verification: a plain one's `step`, a pipeline's `train_batch`, and their micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.engine import step_seams
from ds_moe_ep.errors import EngineError

Take = Callable[[], Any]


def taker_of(engine: Any, batch: Any, loss_of: Callable[[Any], Tensor] | None) -> Take:
    """A function that takes the next step of an engine with micro-batches of `batch`.

    Raises EngineError where a pipeline is given a loss.
    """
    if step_seams.runs_stages(engine):
        if loss_of is not None:
            raise EngineError("verify: loss_of: a pipeline's loss is its PipelineModule's loss_fn; leave it out")
        data = None if batch is None else _micro_batches(batch)
        return lambda: engine.train_batch(data)
    batches = _micro_batches(batch)

    def take() -> None:
        for _ in range(engine.gradient_accumulation_steps()):
            args, kwargs = _arguments(next(batches))
            engine.backward((loss_of or _loss_in)(engine(*args, **kwargs)))
            engine.step()

    return take


@contextmanager
def around_steps(engine: Any, judge: Callable[[Take], Any], behind: Take) -> Iterator[None]:
    """A scope in which `judge` gets each step of the model to take it, and `behind` is called after the engine's."""
    step = "train_batch" if step_seams.runs_stages(engine) else "step"
    taken, model_step = getattr(engine, step), getattr(engine, step_seams.TAKE_MODEL_STEP)

    def step_and_more(*args: Any, **kwargs: Any) -> Any:
        result = taken(*args, **kwargs)
        behind()
        return result

    def judged(*args: Any, **kwargs: Any) -> Any:
        return judge(lambda: model_step(*args, **kwargs))

    with _replaced(engine, step, step_and_more), _replaced(engine, step_seams.TAKE_MODEL_STEP, judged):
        yield


@contextmanager
def _replaced(engine: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A scope in which an engine has another method."""
    own = vars(engine)
    before = {name: own[name]} if name in own else {}
    own[name] = method
    try:
        yield
    finally:
        own.pop(name, None)
        own.update(before)


class LastBatch:
    """The micro-batch that an engine trained with last, to ask the model again."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._of_stages: Any = None  # as the pipeline's first and last stage read it

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A scope in which micro-batches are kept."""
        with ExitStack() as scopes:
            hook = self._engine.module.register_forward_pre_hook(self._keep, with_kwargs=True)
            scopes.callback(hook.remove)
            if step_seams.runs_stages(self._engine):
                before = self._engine.batch_fn
                self._engine.set_batch_fn(lambda raw: self._keep_raw(raw, before))
                scopes.callback(self._engine.set_batch_fn, before)
            yield

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.args, self.kwargs = args, kwargs

    def _keep_raw(self, raw: Any, then: Callable[[Any], Any] | None) -> Any:
        self._of_stages = raw
        return raw if then is None else then(raw)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Outputs of the model for it in evaluation; a pipeline's loss. Collective where the model is."""
        engine = self._engine
        was_training = engine.module.training
        engine.eval()
        try:
            if step_seams.runs_stages(engine):
                return list(_tensors_in(engine.eval_batch(iter([self._of_stages]), num_micro_batches=1)))
            return list(_tensors_in(engine(*self.args, **self.kwargs)))
        finally:
            engine.train(was_training)


def _micro_batches(batch: Any) -> Iterator[Any]:
    """One micro-batch after the other; a single one is repeated."""
    if hasattr(batch, "__next__"):
        yield from batch
        raise EngineError("verify: batch: the iterator has ended; it needs two batches of all micro-batches")
    while True:
        yield batch


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (list, tuple)) else ((batch,), {})


def _loss_in(output: Any) -> Tensor:
    """The loss in a model's output."""
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None:
        found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise EngineError("verify: the model's output has no loss that is one number: pass loss_of=<function of it>")
    return found


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors_in(value)
