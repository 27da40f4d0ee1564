"""Copies of hot experts serve an engine's windows: all micro-batches from one step of its optimizer to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.moe.replicas.replicas import Replicas, begin_windows


class ReplicaWindows(EngineCallback):
    """Begins a window of the layers' copies where their weights change: by a step, or from a checkpoint.

    An engine has one, whoever installs it.
    """

    def __init__(self, engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
        self.number = 0  # of the window
        self._engine, self._layers = engine, layers
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

    def is_last(self) -> bool:
        """True in the backward passes of the last micro-batch before a step."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @contextmanager
    def around_call(self, method: str) -> Iterator[None]:
        """Refuses a step whose gradients are not all at home; opens loans in the last forward pass of a window.

        Each layer's pass opens that of the layer behind it: its gradients come under one layer's backward pass, and
        no more than one layer's wait for them.
        """
        replicas = self._replicas()
        if method == "step" and self.is_last():
            for name, each in replicas.items():
                each.refuse_unsent(name)
        is_last_forward = method == "forward" and self.is_last() and bool(replicas)
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

    def after_model_step(self, is_applied: bool) -> None:
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
