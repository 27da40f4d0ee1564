"""One system's turn on this rank: a pass, its wall time, and what that was spent on.

`blocked` sees what the thread waits for; our layers' rows travel on lanes, where the recorder sees them, and their
exchange of counts is timed apart. So for every system `experts_traffic` is all that concerns its experts' routes and
rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from ds_moe_ep.bench.meters.blocked import blocked, break_down
from ds_moe_ep.bench.meters.busy import Busy, busy_meter, elapsing_meter
from ds_moe_ep.bench.rivals.emulated import EmulatedDevice
from ds_moe_ep.bench.systems.build import OURS, System
from ds_moe_ep.bench.systems.plan import SystemsPlan
from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.recorder import make_recorder
from ds_moe_ep.engine import seams
from ds_moe_ep.records.names import BASELINE, PARTS
from ds_moe_ep.schedule.spans import Span, overlap


class Turn:
    """One system on this rank, and what its last pass told."""

    def __init__(self, system: System, device: EmulatedDevice, plan: SystemsPlan) -> None:
        self.system, self._emulated, self._plan = system, device, plan
        self.step = 0  # of training, over all beds
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.device: torch.device = system.engine.device
        self._expert_group, _ = seams.expert_group(plan.ep_size, data_before_expert=False)
        self.recorder = make_recorder(self.device, dist.get_rank()) if system.name in OURS else None
        if self.recorder is not None:
            for layer in system.engine.moe_ep_layers.values():
                layer.dispatcher.record(self.recorder)

    def run(self, mode: str) -> None:
        """One pass; leaves `seconds`: the pass, its parts, what the device was busy, traffic total and exposed."""
        system, is_emulated = self.system, self._plan.is_emulated
        with ExitStack() as meters:
            meters.enter_context(world_of(system.engine))
            waits = meters.enter_context(blocked(self._label))
            optimizer = meters.enter_context(optimizer_time(system.engine, waits))
            counts = meters.enter_context(counts_time())
            self._synchronize()
            dist.barrier()
            waits.seconds.clear()
            start_s = time.perf_counter()
            with self._busy_meter() as busy:
                (system.train if mode == "training" else system.forward)(self.step)
                self._synchronize()
            seconds = time.perf_counter() - start_s
        busy_s = seconds * busy.percent / 100
        self.spans = self.recorder.spans() if self.recorder is not None else []
        traffic = overlap(self.spans)
        parts = break_down(
            seconds,
            waits.seconds,
            optimizer_s=sum(optimizer),
            exposed_s=1e-6 * traffic.exposed_us + sum(counts),
            compute_s=busy_s if is_emulated else None,
        ).parts
        self.seconds = {"step": seconds, "busy": busy_s, **{f"breakdown.{part}": parts[part] for part in PARTS}}
        if self.spans:
            self.seconds |= {"traffic.total": 1e-6 * traffic.total_us, "traffic.exposed": 1e-6 * traffic.exposed_us}
        self.step += mode == "training"

    def _busy_meter(self) -> AbstractContextManager[Busy]:
        if self._plan.is_emulated:
            return elapsing_meter(lambda: self._emulated.busy_s)
        return busy_meter(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _label(self, function: str, size: int, group: object) -> str | None:
        """The part that a blocked call belongs to. Our rows are the recorder's to account for."""
        if self.system.name == BASELINE:
            # All over a tensor group is its traffic, messages between stages too, which are sent in parts and gathered
            # in it. The rest waits for the other stage; one copy of the model has no gradients to reduce.
            return "tensor_traffic" if size == self._plan.layout.tp_size else "pipeline"
        if function in ("all_to_all_single", "all_to_all", "send", "recv"):
            return None if self.recorder is not None else "experts_traffic"
        return "experts_traffic" if group is self._expert_group else "gradients"


@contextmanager
def world_of(engine: Any) -> Iterator[None]:
    """DeepSpeed's notion of the world, which is global, as this engine made it."""
    groups.mpu = engine.mpu
    yield


@contextmanager
def optimizer_time(engine: Any, waits: Any) -> Iterator[list[float]]:
    """The seconds of the engine's optimizer, without what it waits for."""
    optimizer, seconds = engine.optimizer, []
    step = optimizer.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        with waits.own_time() as own:
            result = step(*args, **kwargs)
        seconds.append(own.seconds)
        return result

    optimizer.step = timed
    try:
        yield seconds
    finally:
        del optimizer.step


@contextmanager
def counts_time() -> Iterator[list[float]]:
    """The seconds of our layers' exchange of counts, in which ranks wait for the latest."""
    exchange, seconds = LaneGroups.exchange_counts, []

    def timed(lanes: LaneGroups, counts_PC: torch.Tensor) -> torch.Tensor:
        start_s = time.perf_counter()
        try:
            return exchange(lanes, counts_PC)
        finally:
            seconds.append(time.perf_counter() - start_s)

    LaneGroups.exchange_counts = timed  # type: ignore[method-assign, assignment]
    try:
        yield seconds
    finally:
        LaneGroups.exchange_counts = exchange  # type: ignore[method-assign]
