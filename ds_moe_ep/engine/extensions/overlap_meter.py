"""How much of the experts' communication was hidden, measured on every n-th step, with a blocking control beside it.

1. The step before a measured one may run the control: the same pieces at depth 0, with the same results. What the
   meter calls hidden there is its own error, and should be about 0 %.
2. A measured step is recorded as it runs. After it, the times of all ranks are summed in one all-reduce.
3. In all other steps the layers hold the recorder that is off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ds_moe_ep.comm.recorder import Off, make_recorder
from ds_moe_ep.comm.transport import LANES
from ds_moe_ep.engine.extensions.measurement import Event, Measurement, events, table
from ds_moe_ep.engine.layouts.tensor import group_of_shares, sum_over_shares
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.errors import EngineError
from ds_moe_ep.records.quantity import number
from ds_moe_ep.schedule.spans import Overlap, Span, Tags, accounts, accounts_of_lanes, write_trace

# A control costs the time that overlap saves. One per ten measurements keeps that under 1 % with "meter_every": 10,
# as long as a blocking step takes less than twice the time of an overlapped one.
MEASUREMENTS_PER_CONTROL = 10
PHASES = ("forward", "backward")

Role = Literal["plain", "control", "measured"]


class OverlapMeter:
    """Records one step in every `every`, and a blocking control before the first and before each tenth one after it.

    A transfer counts from its start to its completion; it is hidden while an expert computes on the same rank. All
    training passes between two optimizer steps count: micro-batches and recomputation. Layers with ep_size 1 have no
    communication and are left out. `last` and `control` are None until they were measured; `spans` are this rank's
    of the last measured step.
    """

    def __init__(self, layers: Mapping[str, OverlappedLayer], device: torch.device, every: int) -> None:
        self.last: Measurement | None = None
        self.control: Measurement | None = None
        self.spans: list[Span] = []
        self.check: tuple[int, float] | None = (
            None  # the last step with a check of `verify_every`, and its milliseconds
        )
        self._dispatchers = {name: layer.dispatcher for name, layer in layers.items() if layer.ep_size > 1}
        self._device = device
        self._every = every
        self._recorder = make_recorder(device, dist.get_rank())
        self._step = 1  # the one that runs
        self._measured_since_control = 0
        self._role: Role = "plain"
        self._begin_step()

    def hidden_percent(self) -> float | None:
        """The hidden share of the last measured step's communication; None before one was measured. Local."""
        return None if self.last is None else self.last.hidden_percent

    def control_percent(self) -> float | None:
        """The same share of the last blocking control: about 0 where the meter tells the truth. Local."""
        return None if self.control is None else self.control.hidden_percent

    def report(self) -> str:
        """The last measured step as a table by layer, pass and peer group, and the cost of a check. Local."""
        told = "no step was measured yet" if self.last is None else table(self.last, self.control)
        return (
            told
            if self.check is None
            else f"{told}\nverify_every: {number(self.check[1], 2)} ms in step {self.check[0]}"
        )

    def take_check(self, step: int, took_ms: float) -> None:
        """Takes the time on this rank of a check of `verify_every`. Local."""
        self.check = (step, took_ms)

    def events(self, num_samples: int) -> list[Event]:
        """The last measured step for `engine.monitor`, by layer and pass. Local."""
        found = [] if self.last is None else events(self.last, self.control, num_samples)
        return found if self.check is None else [*found, ("Train/moe_ep/verify_every_ms", self.check[1], num_samples)]

    def step(self) -> bool:
        """Ends an optimizer step and readies the layers for the next one; returns whether it was a measured one.

        Collective over the data-parallel ranks after a recorded step, local after any other.
        """
        role = self._role
        if role != "plain":
            spans = self._recorder.spans()
            found = self._sum_over_ranks(spans)
            if role == "control":
                self.control, self._measured_since_control = found, 0
            else:
                self.last, self.spans = found, spans
                self._measured_since_control += 1
        self._step += 1
        self._begin_step()
        return role == "measured"

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the last measured step of all ranks as a Chrome trace, for chrome://tracing and ui.perfetto.dev.

        Collective over the world; rank 0 writes, and makes the folder. Raises EngineError on every rank where no step
        was measured yet.
        """
        if self.last is None:
            raise EngineError(
                f"moe_ep.meter_every={self._every}: no step was measured in {self._step - 1}, so there is no trace; "
                "train longer, or measure more often"
            )
        gathered: list[list[Span]] | None = None
        if dist.get_rank() == 0:
            gathered = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(self.spans, gathered)
        if gathered is not None:
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_trace(target, (span for spans in gathered for span in spans))

    def end(self) -> None:
        """Gives the layers the recorder that is off. Local; the last measurement stays."""
        for dispatcher in self._dispatchers.values():
            dispatcher.record(Off())

    def _begin_step(self) -> None:
        is_control_due = self.control is None or self._measured_since_control >= MEASUREMENTS_PER_CONTROL
        self._role = role_of(self._step, self._every, is_control_due)
        if self._role != "plain":
            self._recorder.spans()  # drops what is old, and moves the origin of CUDA's times to this step
        recorder = Off() if self._role == "plain" else self._recorder
        for dispatcher in self._dispatchers.values():
            dispatcher.record(recorder, is_blocking=self._role == "control")

    def _sum_over_ranks(self, spans: list[Span]) -> Measurement:
        keys, parts, lanes = self._keys(), accounts(spans), accounts_of_lanes(spans)
        mine = [*(parts.get(key, Overlap(0, 0)) for key in keys), *(lanes[lane] for lane in LANES)]
        times_us = torch.tensor([(o.total_us, o.exposed_us) for o in mine], dtype=torch.float64, device=self._device)
        summed = [Overlap(*times) for times in sum_over_shares(times_us).tolist()]
        parts, lanes = dict(zip(keys, summed, strict=False)), dict(zip(LANES, summed[-len(LANES) :], strict=True))
        num_ranks = dist.get_world_size(group_of_shares())
        whole = parts[Tags()]
        return Measurement(whole.total_us, whole.exposed_us, self._step, num_ranks, parts, lanes)

    def _keys(self) -> list[Tags]:
        """Every part of a step's communication, of all ranks: expert groups may have chosen different schedules."""
        gathered: list[list[Tags]] = [[] for _ in range(dist.get_world_size(group_of_shares()))]
        dist.all_gather_object(gathered, self._own_keys(), group=group_of_shares())
        return list(dict.fromkeys(key for keys in gathered for key in keys))

    def _own_keys(self) -> list[Tags]:
        """Those of this rank's schedules: a rank without rows lists them too."""
        keys: list[Tags] = []
        for dispatcher in self._dispatchers.values():
            name, labels = dispatcher.name, dispatcher.checked_connection().forward.labels
            for phase in PHASES:
                keys += [Tags(name, phase, label).group for label in labels]
                keys.append(Tags(name, phase))
            keys.append(Tags(name))
        return list(dict.fromkeys([*keys, *(Tags("", phase) for phase in PHASES), Tags()]))


def role_of(step: int, every: int, is_control_due: bool) -> Role:
    """The role of a step, counted from 1, for the meter. With `every` 1 a control takes the place of a measurement."""
    if is_control_due and (step + 1) % every == 0:
        return "control"
    return "measured" if step % every == 0 else "plain"
