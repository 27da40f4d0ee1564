"""What the company does after each optimizer step: the monitor hears of load and communication, the log of choices."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.choices import ChoiceLog
from ds_moe_ep.engine.extensions.overlap_meter import OverlapMeter
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer


def after_each_step(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Wraps `engine.step` so that it ends with the reports, where parameters were updated."""
    engine_step = engine.step
    meter: OverlapMeter | None = getattr(engine, "moe_ep_meter", None)
    choices = ChoiceLog(layers)

    @functools.wraps(engine_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        is_boundary = engine.is_gradient_accumulation_boundary()
        result = engine_step(*args, **kwargs)
        if engine.was_step_applied():
            report_load(engine, layers)
            choices.tell()
        if meter is not None and (is_boundary or engine.was_step_applied()):
            report_communication(engine, meter)
        return result

    engine.step = step


def report_load(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Writes each layer's load (fullest expert over the mean) to the engine's monitor, every steps_per_print.

    Collective where it reports; free where no monitor is on.
    """
    every = engine.steps_per_print()
    if not engine.monitor.enabled or not every or engine.global_steps % every:
        return
    counts = [layer.last_counts_E.to(engine.device) for layer in layers.values()]
    summed = seams.sum_over_data_parallel(torch.cat(counts)).split([len(each) for each in counts])
    loads = [float(load_imbalance(load_E[None])) for load_E in summed]
    engine.monitor.write_events(
        [
            (f"Train/moe_ep/{name}/load_max_over_mean", load, engine.global_samples)
            for name, load in zip(layers, loads, strict=True)
        ]
    )


def report_communication(engine: Any, meter: OverlapMeter) -> None:
    """Ends the meter's step, and writes a measured one to the engine's monitor. Collective where it was recorded."""
    if meter.step() and engine.monitor.enabled:
        engine.monitor.write_events(meter.events(engine.global_samples))


def load_imbalance(load_LE: Tensor) -> Tensor:
    """The fullest expert's rows over the mean of its layer [L]: 1 is balanced, E is all to one."""
    load_LE = load_LE.double()
    return load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-12)
