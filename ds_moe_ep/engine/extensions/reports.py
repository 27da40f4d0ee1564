"""Reports after an optimizer step: the engine's monitor hears of the experts' load and of their communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, StepCall
from ds_moe_ep.engine.extensions.overlap_meter import OverlapMeter
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer


class LoadReport(EngineCallback):
    """Writes each layer's load (fullest expert over the mean) to the engine's monitor, every steps_per_print.

    Collective where it reports; free where no monitor is on.
    """

    def __init__(self, engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
        self._engine, self._layers = engine, layers

    def after_step(self, step: StepCall) -> None:
        engine, every = self._engine, self._engine.steps_per_print()
        if not step.is_applied or not engine.monitor.enabled or not every or engine.global_steps % every:
            return
        counts = [layer.last_counts_E.to(engine.device) for layer in self._layers.values()]
        summed = seams.sum_over_data_parallel(torch.cat(counts)).split([len(each) for each in counts])
        loads = [float(load_imbalance(load_E[None])) for load_E in summed]
        engine.monitor.write_events(
            [
                (f"Train/moe_ep/{name}/load_max_over_mean", load, engine.global_samples)
                for name, load in zip(self._layers, loads, strict=True)
            ]
        )


class MeterReport(EngineCallback):
    """Ends the meter's step, and writes a measured one to the engine's monitor. Collective where it was recorded."""

    def __init__(self, engine: Any, meter: OverlapMeter) -> None:
        self._engine, self._meter = engine, meter

    def after_step(self, step: StepCall) -> None:
        # A skipped step is one too: its passes were recorded.
        if (step.is_boundary or step.is_applied) and self._meter.step() and self._engine.monitor.enabled:
            self._engine.monitor.write_events(self._meter.events(self._engine.global_samples))

    def close(self) -> None:
        self._meter.end()


def load_imbalance(load_LE: Tensor) -> Tensor:
    """The fullest expert's rows over the mean of its layer [L]: 1 is balanced, E is all to one."""
    load_LE = load_LE.double()
    return load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-12)
