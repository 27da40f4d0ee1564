"""The balancing bias, and the load of the batch, follow the steps of an engine's optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from ds_moe_ep.config.section import SECTION
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer

OF_EXTENSIONS = (
    "attach",
    "meter_every",
    "verify_every",
    "watch",
    "report_every",
)  # knobs that a layer cannot honour by itself


class BalanceSteps(EngineCallback):
    """Moves the balancing bias of the layers after each step of the optimizer; tells once which knobs have no effect.

    An engine has one, whoever installs it: no bias moves twice.
    """

    def __init__(self, engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
        self._engine, self._layers = engine, layers
        self._is_first = True

    def after_model_step(self, is_applied: bool) -> None:
        if is_applied:
            step_balance(self._engine, self._layers)
        else:  # an overflow under loss scaling: a batch that moved no parameter moves no bias
            forget_load(self._layers)
        for layer in self._layers.values():
            if layer.batch_load is not None:
                layer.batch_load.forget()
        if self._is_first:  # not before: ds_moe_ep.initialize extends the engine after DeepSpeed has made it
            self._is_first = False
            warn_of_unused_knobs(self._engine, self._layers)


def step_balance(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Moves the expert bias of every layer that has one. Collective over the ranks that share a batch."""
    for layer in layers.values():
        if layer.balance is not None:
            layer.balance.step(partial(seams.sum_over_batch, engine))


def forget_load(layers: Mapping[str, OverlappedLayer]) -> None:
    """Drops the load since the last step. Local."""
    for layer in layers.values():
        if layer.balance is not None:
            layer.balance.forget()


def warn_of_unused_knobs(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Says which knobs have no effect in an engine that DeepSpeed made alone."""
    if "moe_ep_layers" in vars(engine):
        return
    unused = {
        name: value for each in layers.values() for name in OF_EXTENSIONS if (value := getattr(each.config, name))
    }
    for name, value in unused.items():
        seams.log_rank0(
            f"{SECTION}.{name}={value!r}: deepspeed.initialize alone does not do this; call "
            "ds_moe_ep.attach_overlap(engine) after it, or ds_moe_ep.initialize in its place",
            logging.WARNING,
        )
