"""One system as a candidate: an engine, its passes, their wall time, and what that was spent on.

`blocked` sees what the thread waits for; our layers' rows travel on lanes, where the recorder sees them, and their
exchange of counts is timed apart. So for every system `experts_traffic` is all that concerns its experts' routes and
rows.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.bench.candidates.emulated import EmulatedDevice
from ds_moe_ep.bench.meters.blocked import Blocked, blocked, break_down
from ds_moe_ep.bench.meters.busy import Busy, busy_meter, elapsing_meter
from ds_moe_ep.bench.meters.wrapped import Method, wrapped
from ds_moe_ep.bench.systems.data import Data
from ds_moe_ep.bench.systems.plan import OURS, SystemsPlan
from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.recorder import make_recorder
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.layouts.known_groups import KnownGroups
from ds_moe_ep.engine.pipeline import Pipeline
from ds_moe_ep.model.text import Batch, micro_batch_starts
from ds_moe_ep.records.names import PARTS
from ds_moe_ep.schedule.spans import Span, overlap

EXCHANGES = ("all_to_all_single", "all_to_all", "send", "recv")


class SystemCandidate(ABC):
    """One system on this rank, and what its last pass told. Passes are collective over the world."""

    def __init__(self, name: str, engine: Any, data: Data, device: EmulatedDevice, plan: SystemsPlan) -> None:
        self.name, self.engine, self._data, self._emulated, self._plan = name, engine, data, device, plan
        self.step = 0  # of training, over all environments
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.device: torch.device = engine.device
        self._groups = KnownGroups.now()
        self.recorder = make_recorder(self.device, dist.get_rank()) if name in OURS else None
        if self.recorder is not None:
            for layer in engine.moe_ep_layers.values():
                layer.dispatcher.record(self.recorder)

    @abstractmethod
    def train(self, step: int) -> object:
        """One optimizer step on the sequences of step `step`."""

    @abstractmethod
    def forward(self, step: int) -> object:
        """One forward pass on the same sequences, without gradients."""

    @abstractmethod
    def cross_entropy(self) -> Tensor:
        """The mean loss of the last training step, over all ranks."""

    @abstractmethod
    def loads(self) -> Tensor:
        """Rows [L, E] of all ranks in the last training step."""

    @abstractmethod
    def label(self, function: str, size: int, group: object) -> str | None:
        """The part that a blocked call belongs to; None for what the recorder accounts for."""

    def run(self, mode: str) -> None:
        """One pass; leaves `seconds`: the pass, its parts, what the device was busy, traffic total and exposed."""
        self._groups.put_in_force()
        with ExitStack() as meters:
            waits = meters.enter_context(blocked(self.label))
            optimizer = meters.enter_context(optimizer_time(self.engine, waits))
            counts = meters.enter_context(counts_time())
            self._synchronize()
            dist.barrier()
            waits.seconds.clear()
            start_s = time.perf_counter()
            with self._busy_meter() as busy:
                (self.train if mode == "training" else self.forward)(self.step)
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
            compute_s=busy_s if self._plan.is_emulated else None,
        ).parts
        self.seconds = {"step": seconds, "busy": busy_s, **{f"breakdown.{part}": parts[part] for part in PARTS}}
        if self.spans:
            self.seconds |= {"traffic.total": 1e-6 * traffic.total_us, "traffic.exposed": 1e-6 * traffic.exposed_us}
        self.step += mode == "training"

    def _batches(self, step: int, rank: int, num_ranks: int) -> Iterator[Batch]:
        """This rank's micro-batches of a step, of `num_ranks` that share the sequences."""
        count = self.engine.train_micro_batch_size_per_gpu()
        for first in micro_batch_starts(count, rank, num_ranks, self.engine.gradient_accumulation_steps()):
            yield self._data.batch(step, first, count)

    def _busy_meter(self) -> AbstractContextManager[Busy]:
        if self._plan.is_emulated:
            return elapsing_meter(lambda: self._emulated.busy_s)
        return busy_meter(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class ExpertParallelCandidate(SystemCandidate):
    """A model whose ranks each take their part of the batch and share the experts."""

    def __init__(self, name: str, engine: Any, data: Data, device: EmulatedDevice, plan: SystemsPlan) -> None:
        super().__init__(name, engine, data, device, plan)
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._expert_group, _ = seams.expert_group(plan.ep_size, data_before_expert=False)

    def train(self, step: int) -> None:
        self.engine.train()
        self._losses, self._counts = [], []
        for batch in self._on_device(step):
            output = self.engine(*batch)
            self.engine.backward(output.loss)
            self.engine.step()
            self._losses.append(output.cross_entropy)
            self._counts.append(output.exp_counts_LE)

    @torch.no_grad()
    def forward(self, step: int) -> None:
        """In training mode, which computes the same here: recorders look at nothing else."""
        for batch in self._on_device(step):
            self.engine(*batch)

    def cross_entropy(self) -> Tensor:
        loss = torch.stack(self._losses).mean()
        dist.all_reduce(loss)
        return loss / dist.get_world_size()

    def loads(self) -> Tensor:
        rows_LE = torch.stack(self._counts).sum(0)
        dist.all_reduce(rows_LE)
        return rows_LE

    def label(self, function: str, size: int, group: object) -> str | None:
        if function in EXCHANGES:
            return None if self.recorder is not None else "experts_traffic"
        return "experts_traffic" if group is self._expert_group else "gradients"

    def _on_device(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._batches(step, dist.get_rank(), dist.get_world_size()):
            yield tuple(ids.to(self.device) for ids in batch)


class PipelineCandidate(SystemCandidate):
    """A model that is cut, under DeepSpeed's pipeline engine."""

    def __init__(self, name: str, engine: Any, data: Data, device: EmulatedDevice, plan: SystemsPlan) -> None:
        super().__init__(name, engine, data, device, plan)
        is_cut_in_width = plan.cuts[name].layout.tp_size > 1
        self._tensor_group = engine.module.tensor_group if is_cut_in_width else None
        self._copies = [engine.data_parallel_group, *engine.expert_data_parallel_group.values()]

    def train(self, step: int) -> None:
        self.engine.train_batch(self._of_copy(step))

    def forward(self, step: int) -> None:
        micro_batches = self.engine.gradient_accumulation_steps()
        self.engine.eval_batch(
            self._of_copy(step), compute_loss=True, bcast_loss=False, num_micro_batches=micro_batches
        )
        for block in self.engine.module.blocks:
            block.take_counts()

    def cross_entropy(self) -> Tensor:
        loss: Tensor = self.engine.agg_additional_losses["cross_entropy"]
        return loss

    def loads(self) -> Tensor:
        model: Pipeline = self.engine.module
        here = {block.index: block.take_counts() for block in model.blocks}
        num_experts = len(next(iter(here.values())))
        num_layers = self.engine.grid.pipe_parallel_size * len(here)
        rows_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=self.device)
        if self.engine.grid.get_slice_parallel_rank() == 0:  # the others of its tensor group counted the same rows
            for index, rows_E in here.items():
                rows_LE[index] = rows_E
        dist.all_reduce(rows_LE)
        return rows_LE

    def label(self, function: str, size: int, group: object) -> str | None:
        # All over a tensor group is its traffic, messages between stages too, which are sent in parts and gathered
        # in it. Stages send over the group of the world, layers over lanes. The rest waits for the other stage.
        if group is None:
            return "pipeline"
        if group is self._tensor_group:
            return "tensor_traffic"
        is_world = group is dist.group.WORLD
        if function in EXCHANGES:
            return "pipeline" if is_world else None
        return "gradients" if is_world or any(group is copies for copies in self._copies) else "pipeline"

    def _of_copy(self, step: int) -> Iterator[Batch]:
        grid = self.engine.grid
        return self._batches(step, grid.get_data_parallel_rank(), grid.get_data_parallel_world_size())


@contextmanager
def optimizer_time(engine: Any, waits: Blocked) -> Iterator[list[float]]:
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
    seconds: list[float] = []

    @contextmanager
    def timed() -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        finally:
            seconds.append(time.perf_counter() - start_s)

    def wrap(name: str, method: Method) -> Method:
        if name == "consult":  # starts an exchange, and gives back the function that ends it
            return lambda *words: timed()(method(*words))
        return timed()(method)

    with wrapped(LaneGroups, ("exchange_counts", "consult"), wrap):
        yield seconds
