"""The meter's step ends with the engine's, and the engine's monitor hears of a measured one."""

from __future__ import annotations

from typing import Any

from ds_moe_ep.engine.extensions.callback import EngineCallback, StepCall
from ds_moe_ep.engine.extensions.overlap_meter import OverlapMeter


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
