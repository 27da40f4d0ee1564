"""DeepSpeed's `wall_clock_breakdown` for the package's layers, and what its words mean where transfers are hidden.

`fwd_moe` is the time of the layers' forward passes, `top_k` that of their gates. DeepSpeed's layer does nothing else in
its two exchanges; here experts compute meanwhile, so `1st_a2a` and `2nd_a2a` are what nothing hid: the time in which
rows were on their way out, or results back, and no expert computed. Each is in milliseconds, of this rank, and of the
forward passes of training, recomputed ones included, since it was read: the engine reads once per optimizer step, as it
does the time `fwd`.

Nothing is recorded where the breakdown is off. On CUDA passes record events; only who reads waits for the device.
"""

from __future__ import annotations

import torch

from ds_moe_ep.comm.recorder import Off, Recorder, Scope, make_recorder
from ds_moe_ep.schedule.spans import Span, Tags, accounts_of_lanes

FORWARD = "forward"
MAX_PASSES = 256  # kept for a reader that does not come


class LayerClock:
    """The clock of one layer."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self._spans: list[Span] = []
        self._is_read = False
        self._num_passes = 0
        self.is_on = False

    def __deepcopy__(self, memo: object) -> LayerClock:
        return LayerClock()

    def __reduce__(self) -> tuple[type[LayerClock], tuple[()]]:
        return LayerClock, ()

    def begin(self, device: torch.device, is_on: bool) -> None:
        """A forward pass begins, which is timed or not; the first timed one behind a reading starts anew."""
        self.is_on = is_on
        if not is_on:
            return
        if self._is_read or self._num_passes >= MAX_PASSES or self.recorder is None:
            self.recorder = make_recorder(device, rank=0)
            self._spans, self._is_read, self._num_passes = [], False, 0
        self._num_passes += 1

    def scope(self, name: str) -> Scope:
        """A scope around a part of the pass."""
        return self.lanes.scope("host", name, Tags("", FORWARD))

    @property
    def lanes(self) -> Recorder:
        """The recorder of the pass that runs now."""
        return self.recorder if self.is_on and self.recorder is not None else Off()

    def part_ms(self, name: str) -> float:
        """The milliseconds of a part; 0 where nothing was recorded."""
        spans = self._read()
        return sum((s.stop_us - s.start_us for s in spans if s.lane == "host" and s.name == name), 0.0) / 1000

    def exposed_ms(self, lane: str) -> float:
        """The milliseconds of a lane's transfers that no expert's products hid."""
        spans = [span for span in self._read() if span.tags.phase == FORWARD and span.lane != "host"]
        return accounts_of_lanes(spans)[lane].exposed_us / 1000

    def _read(self) -> list[Span]:
        self._is_read = self.recorder is not None
        self._spans += [] if self.recorder is None else self.recorder.spans()
        return self._spans


class Timed:
    """Times of an MoE layer as DeepSpeed's engine reads them, in milliseconds."""

    def layer_clock(self) -> LayerClock:
        """The layer's clock."""
        raise NotImplementedError

    @property
    def time_moe(self) -> float:
        """The forward passes."""
        return self.layer_clock().part_ms("moe")

    @property
    def time_falltoall(self) -> float:
        """Rows on their way out that nothing hid."""
        return self.layer_clock().exposed_ms("dispatch")

    @property
    def time_salltoall(self) -> float:
        """Results on their way back that nothing hid."""
        return self.layer_clock().exposed_ms("combine")
