"""Copies of hot experts serve an engine's windows: all micro-batches from one step of its optimizer to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from ds_moe_ep.engine import step_seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.moe.replicas.replicas import Replicas, begin_windows


class ReplicaWindows(EngineCallback):
    """Begins a window of the layers' copies where their weights change: by a step, or from a checkpoint.

    An engine has one, whoever installs it. A pipeline's engine says of no backward pass that it is a step's last, and
    has several micro-batches on their way: there passes are counted, and copies stay for the whole window.
    """

    def __init__(self, engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
        self.number = 0  # of the window
        self._engine, self._layers = engine, layers
        self._is_in_stages = step_seams.runs_stages(engine)
        for layer in layers.values():
            layer.dispatcher.follow(self)

    @staticmethod
    def is_needed(layers: Mapping[str, OverlappedLayer]) -> bool:
        """True where a layer has slots for copies."""
        return any(layer.config.replicas and layer.ep_size > 1 for layer in layers.values())

    @property
    def micro_batches(self) -> int:
        """Micro-batches from one step to the next."""
        return int(self._engine.gradient_accumulation_steps())

    @property
    def is_in_order(self) -> bool:
        """True where each micro-batch goes backward before the next one goes forward."""
        return not self._is_in_stages

    def is_last(self, passes: int) -> bool:
        """True in the backward passes of the last micro-batch before a step; `passes` have gone backward by now.

        A stage that recomputes for a second backward pass counts more: it sends what it has in each from there on.
        """
        if self._is_in_stages:
            return passes >= self.micro_batches
        return bool(self._engine.is_gradient_accumulation_boundary())

    @contextmanager
    def around_call(self, method: str) -> Iterator[None]:
        """Refuses a step whose gradients are not all at home; opens loans in the last forward pass of a window.

        Each layer's pass opens that of the layer behind it: its gradients come under one layer's backward pass, and
        no more than one layer's wait for them.
        """
        replicas = self._replicas()
        if method == "step" and self.is_last(0):
            self._refuse_unsent()
        is_last_forward = method == "forward" and not self._is_in_stages and self.is_last(0) and bool(replicas)
        if is_last_forward:
            ordered = list(replicas.values())
            for each, behind in pairwise(ordered):
                each.opens = behind
            ordered[0].open_loan()
        try:
            yield
        finally:
            for each in replicas.values() if is_last_forward else ():
                each.close_loan()

    def _replicas(self) -> dict[str, Replicas]:
        found = {name: layer.dispatcher.replicas for name, layer in self._layers.items()}
        return {name: replicas for name, replicas in found.items() if replicas is not None}

    def _refuse_unsent(self) -> None:
        for name, each in self._replicas().items():
            each.refuse_unsent(name)

    def before_model_step(self) -> None:
        if self._is_in_stages:
            self._refuse_unsent()

    def after_model_step(self, is_applied: bool) -> None:
        for each in self._replicas().values():
            each.forget_passes()
        if is_applied:
            self.number += 1
            begin_windows(list(self._replicas().values()))

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        try:
            return proceed(load)
        finally:
            self.number += 1

    def close(self) -> None:
        for layer in self._layers.values():
            layer.dispatcher.follow(None)
