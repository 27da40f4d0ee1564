"""`"schedule": "auto"`: chooses a layer's schedule from a short measurement, the same on all ranks.

On the first forward pass of training, with its real rows and experts:

1. Probe: one exchange of the near rows, of the far rows and of next to nothing, and one serial pass, each a few times.
   The ranks average what they measured: from here on all of them compute with the same numbers.
2. Price every candidate (`price.py`) and keep the cheapest ones.
3. Benchmark these beside the serial schedule, forward and backward, alternating. A schedule wins only where its time is
   below the serial one by more than the spread of the rounds; else the layer stays serial.

A choice changes the time; results are as equal as between any two schedules (ARCHITECTURE.md). A measurement leaves no
gradient, fires no parameter's hook, and puts random numbers and experts' buffers back. When the rows that a rank
receives drift from those of the measurement (`retune_drift`), it says so in the next exchange of counts, which every
rank of the group reads: all of them measure again, in the same call.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.comm.lanes import Lanes
from ds_moe_ep.comm.recorder import Off, make_recorder
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.executor import Buffers, PassContext, Steps, run, run_experts
from ds_moe_ep.moe.experts import LocalExperts, SharedExpert
from ds_moe_ep.moe.grouped.choice import groups_products
from ds_moe_ep.moe.layout import lay_out
from ds_moe_ep.moe.router import use_triton
from ds_moe_ep.moe.split_experts import keep
from ds_moe_ep.records.quantity import number
from ds_moe_ep.schedule.build import Kind, Op, Piece, Schedule, backward_schedule, forward_schedule, pieces_of
from ds_moe_ep.schedule.price import Costs, probe_pieces, ranked
from ds_moe_ep.schedule.spans import Span

PROBES = 2  # measured runs of each probe, after one that warms up
ROUNDS = 7
PRICE_STEP = 1e-3  # of the lowest price: what is closer counts as equal
SMOOTHING = 0.05  # weight of one pass in the mean of received rows: some 20 passes count, and no odd batch alone
MIN_PASSES = 200  # between two measurements, each as long as some thirty passes

CHOSEN = ("schedule", "peer_group_size", "row_cuts", "chunks", "depth", "weight_blocks")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Decision of the tuner: the knobs of the schedule, and why. The same on every rank of an expert group."""

    knobs: Mapping[str, Any]
    time_to_serial: float  # measured, median of the rounds; 1 where serial was chosen
    predicted_to_serial: float
    serial_ms: float
    raced: Mapping[str, float]  # the others of the benchmark, under the name that checkpoints have: times over serial's

    def __str__(self) -> str:
        others = "".join(f"; {name}: {number(ratio, 2)}" for name, ratio in self.raced.items())
        return (
            f"{described(self.knobs)}, {number(self.time_to_serial, 2)} of serial's {number(self.serial_ms, 1)} ms "
            f"per pass ({number(self.predicted_to_serial, 2)} predicted{others})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {**dataclasses.asdict(self), "knobs": dict(self.knobs), "raced": dict(self.raced)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str) -> Choice:
        """The choice that `to_dict` gave. Raises ConfigError for anything else."""
        try:
            choice = cls(**values)
            unknown = set(choice.knobs) - set(CHOSEN)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"{path}={values!r}: no choice of a schedule ({error}); leave it out") from None
        if unknown or "schedule" not in choice.knobs:
            raise ConfigError(
                f"{path}.knobs={values['knobs']!r}: expected 'schedule' and others of {CHOSEN}; leave it out"
            )
        return choice


def described(knobs: Mapping[str, Any]) -> str:
    """The schedule that the knobs name, for people."""
    others = ", ".join(f"{name}={value}" for name, value in knobs.items() if name != "schedule")
    return f"{knobs['schedule']} ({others})" if others else str(knobs["schedule"])


class Drift:
    """How far the rows that this rank receives have moved from those of the last measurement. Local."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._base: float | None = None
        self._mean = 0.0
        self._passes = 0

    def restart(self) -> None:
        """A measurement was made: the smoothed rows of now are the base of the next one."""
        self._base, self._passes = self._mean, 0

    def see(self, rows: int) -> None:
        """One training pass received this many rows."""
        if self._base is None:
            self._base = self._mean = float(rows)
        self._mean += SMOOTHING * (rows - self._mean)
        self._passes += 1

    def is_beyond_bound(self) -> bool:
        """True where this rank wants another measurement."""
        if not self._bound or self._base is None or self._passes < MIN_PASSES:
            return False
        return abs(self._mean - self._base) > self._bound * max(self._base, 1.0)  # a base of no rows counts as one


@dataclass(frozen=True)
class AutotuneRun:
    """One measurement, with a pass's own rows (without gradient), plan, experts and transport."""

    config: MoEConfig
    rows_ND: Tensor
    plan: DispatchPlan
    experts: LocalExperts
    transport: Transport
    torus: Torus
    lanes: Lanes
    shared: SharedExpert | None = None

    def choose(self) -> Choice:
        """The schedule to take. Collective over the group; some thirty passes long."""
        with _undisturbed(self.experts, self.rows_ND.device):
            return self._choose()

    def _choose(self) -> Choice:
        # All ranks go on with the same numbers, the means: else two of them might choose two schedules, and hang.
        priced = ranked(self.config, self.torus, self.measure_costs())
        predicted_us = {str(knobs): us for us, knobs in priced}
        serial: Mapping[str, Any] = {"schedule": "serial"}
        finalists = self._finalists(priced)
        times = self._benchmark([serial, *finalists])
        serial_ms = 1e3 * statistics.median(times[0])
        best, best_ratio = serial, 1.0
        others: dict[str, float] = {}
        for knobs, seconds in zip(finalists, times[1:], strict=True):
            # Round by round: both sides of a ratio had the same neighbours on the machine and on the link.
            ratios = [mine / its for mine, its in zip(seconds, times[0], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            others[described(knobs)] = middle
            # Beyond the spread: a gain within it may be chance, and serial costs nothing to keep.
            if high + (high - low) < 1 and middle < best_ratio:
                best, best_ratio = knobs, middle
        others.pop(described(best), None)
        predicted = predicted_us[str(best)] / max(predicted_us[str(serial)], 1e-9)
        return Choice(
            knobs=best, time_to_serial=best_ratio, predicted_to_serial=predicted, serial_ms=serial_ms, raced=others
        )

    def _finalists(self, priced: Sequence[tuple[float, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
        """The cheapest schedule of each kind, and whole groups of peers: what pieces cost beside rows has no price."""
        step_us = max(PRICE_STEP * priced[0][0], 1e-9)

        def order(item: tuple[float, Mapping[str, Any]]) -> tuple[int, int]:
            return round(item[0] / step_us), len(pieces_of(dataclasses.replace(self.config, **item[1]), self.torus))

        kinds: dict[str, Mapping[str, Any]] = {}
        for _, knobs in sorted(priced, key=order):
            kinds.setdefault(knobs["schedule"], knobs)
            if knobs == {"schedule": "peers", "row_cuts": 1}:
                kinds.setdefault("whole groups", knobs)
        kinds.pop("serial")
        return [knobs for i, knobs in enumerate(kinds.values()) if knobs not in list(kinds.values())[:i]]

    def measure_costs(self) -> Costs:
        """The mean rank's costs, the same on every rank. Collective."""
        pieces = probe_pieces(self.torus, int(self._mean([len(self.rows_ND)])[0]))
        found = [self._costs_of(self._wire_spans(pieces), self._serial_spans()) for _ in range(PROBES + 1)][1:]
        # The least of the runs: what disturbs a measurement makes it longer, never shorter.
        values = torch.tensor([dataclasses.astuple(costs) for costs in found], dtype=torch.float64).amin(0)
        return Costs(**dict(zip((f.name for f in dataclasses.fields(Costs)), self._mean(values.tolist()), strict=True)))

    def _costs_of(self, wire: Sequence[Span], serial: Sequence[Span]) -> Costs:
        near_us, far_us, latency_us = (span.stop_us - span.start_us for span in wire)
        computes = [span for span in serial if span.lane == "compute"]

        def total_us(phase: str, kind: Kind) -> float:
            mine = [s for s in computes if s.tags.phase == phase and s.name.startswith(kind.value)]
            return sum(span.stop_us - span.start_us for span in mine)

        return Costs(
            near_us=max(near_us - latency_us, 0.0),
            far_us=max(far_us - latency_us, 0.0),
            latency_us=latency_us,
            forward_us=total_us("forward", Kind.COMPUTE),
            input_grad_us=total_us("backward", Kind.COMPUTE),
            weight_grad_us=total_us("backward", Kind.WEIGHTS),
        )

    def _wire_spans(self, pieces: tuple[Piece, ...]) -> list[Span]:
        """One blocking dispatch of each piece, recorded."""
        ops = tuple(Op(Kind.DISPATCH, piece, (piece - 1,) if piece else ()) for piece in range(len(pieces)))
        probe = Schedule("probe", self.torus, pieces, ops, depth=0)
        recorder = make_recorder(self.rows_ND.device, self.transport.rank)
        context = dataclasses.replace(self._context(probe, probe), recorder=recorder)
        run(probe, context, Buffers.of(self.rows_ND, context), Steps("forward", compute=_nothing))
        return recorder.spans()

    def _serial_spans(self) -> list[Span]:
        recorder = make_recorder(self.rows_ND.device, self.transport.rank)
        self._pass(dataclasses.replace(self._context_of({"schedule": "serial"}), recorder=recorder))
        return recorder.spans()

    def _benchmark(self, knobs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Seconds of each, round by round, of the mean rank. Collective."""
        contexts = [self._context_of(each) for each in knobs]
        times: list[list[float]] = [[] for _ in knobs]
        for index in range(ROUNDS + 1):
            order = list(range(len(contexts)))
            # Back and forth, so that neither a drift of the clock nor what a neighbour left in the caches favours one.
            for side in order if index % 2 else order[::-1]:
                seconds = self._timed(contexts[side])
                if index:  # the first round warms up
                    times[side].append(seconds)
        means = self._mean([seconds for side in times for seconds in side])
        return [means[i : i + ROUNDS] for i in range(0, len(means), ROUNDS)]

    def _timed(self, context: PassContext) -> float:
        self._synchronize()
        start = time.perf_counter()
        self._pass(context)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        """Waits for the own device and for all ranks."""
        self._mean([0.0])

    def _pass(self, context: PassContext) -> None:
        """Forward and backward, weight gradients included, which are made for nobody: parameters are not asked for."""
        rows_ND = self.rows_ND.detach().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
            outputs = run_experts(rows_ND, self.experts, context, self.shared)
        torch.autograd.grad(outputs, rows_ND, [torch.ones_like(rows) for rows in outputs])

    def _context_of(self, knobs: Mapping[str, Any]) -> PassContext:
        config = dataclasses.replace(self.config, **knobs)
        return self._context(forward_schedule(config, self.torus), backward_schedule(config, self.torus))

    def _context(self, forward: Schedule, backward: Schedule) -> PassContext:
        num_shared = 0 if self.shared is None else len(self.shared.x_TD)
        is_grouped = groups_products(self.config, self.experts, (forward, backward), self.rows_ND, self.plan)
        layout = lay_out(self.plan, forward, self.transport.rank, num_shared, is_grouped)
        in_triton = use_triton(self.config, self.rows_ND.device)
        return PassContext(layout, forward, backward, self.transport, self.lanes, Off(), in_triton)

    def _mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the ranks. Collective; waits for the device."""
        summed = self.transport.sum(torch.tensor(values, dtype=torch.float32, device=self.rows_ND.device))
        return [float(value) / self.transport.size for value in summed.tolist()]


def _nothing(rows: object) -> None:
    return None


@contextmanager
def _undisturbed(experts: LocalExperts, device: torch.device) -> Iterator[None]:
    """Random numbers, and buffers of experts that have some, are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in experts.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
