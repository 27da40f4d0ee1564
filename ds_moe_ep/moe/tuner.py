"""`"schedule": "auto"`: chooses a layer's schedule from a short measurement, the same on all ranks.

On the first forward pass of training, with its real rows and experts:

1. Probe: one exchange of the near rows, of the far rows and of next to nothing, all ranks at once, and one serial pass,
   each a few times. The ranks average what they measured: from here on all of them compute with the same numbers.
2. Price every candidate (`price.py`) and keep those that cost nearly as little as the cheapest, and the cheapest of
   each kind: prices know no processor time, and tie where a link is nearly idle or nearly full.
3. Benchmark these beside the serial schedule, forward and backward, alternating, round by round (`benchmark.py`): the
   others leave once they are not likely to be faster than the first by more than may be lost, until it is left. Of
   those that are as fast the cheapest one, of fewer pieces, is taken. It wins only where it is faster than serial by
   more than chance; else the layer stays serial.

A choice changes the time; results are as equal as between any two schedules (ARCHITECTURE.md). A measurement leaves no
gradient, fires no parameter's hook, and puts random numbers and experts' buffers back. When the rows that a rank
receives drift from those of the measurement (`retune_drift`), it says so in the next exchange of counts, which every
rank of the group reads: all of them measure again, in the same call. It says so too when the link has changed: of some
passes one is recorded, and the time of a row on its way compared with that behind the measurement (`drift.py`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.comm.lanes import Lanes
from ds_moe_ep.comm.recorder import Off, Recorder, make_recorder
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.agreement import Agreement, Call, Mode
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.executor import PassContext, Steps, run, run_experts
from ds_moe_ep.moe.experts import LocalExperts, SharedExpert
from ds_moe_ep.moe.graphs.opaque import keep
from ds_moe_ep.moe.grouped.choice import grouped_experts
from ds_moe_ep.moe.layout import lay_out
from ds_moe_ep.moe.router import use_triton
from ds_moe_ep.moe.rows.buffers import Buffers
from ds_moe_ep.records.quantity import number
from ds_moe_ep.schedule.benchmark import SERIAL, benchmark, described
from ds_moe_ep.schedule.build import Op, OpKind, Piece, Schedule, backward_schedule, forward_schedule, pieces_of
from ds_moe_ep.schedule.drift import LinkDrift, LinkSample
from ds_moe_ep.schedule.price import Costs, probe_pieces, ranked
from ds_moe_ep.schedule.spans import Tags

PROBES = 2  # serial passes that are recorded,
WIRE_PROBES = 2  # and times as many exchanges of each kind, behind one that warms up
NEAR = 0.05  # of the lowest price: what is closer is worth a measurement
MOST = 6  # schedules in the first stage, serial beside them
PRICE_STEP = 1e-3  # of the lowest price: what is closer counts as equal
SMOOTHING = 0.05  # weight of one pass in the mean of received rows: some 20 passes count, and no odd batch alone
MIN_PASSES = 200  # between two measurements, each as long as some 25 passes

CHOSEN = ("schedule", "peer_group_size", "row_cuts", "chunks", "depth", "weight_blocks", "two_level")


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


class Drift:
    """How far the rows that this rank receives have moved from those of the last measurement. Local."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._base: float | None = None
        self._mean = 0.0
        self._passes = 0

    def restart(self, measured: Drift | None = None) -> None:
        """A measurement was made: the smoothed rows of now are the base of the next one, or those of `measured`."""
        if measured is not None:
            self._mean = self._base = measured._mean
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


class LinkMeter:
    """Records one of some forward passes, and knows from them when the link has changed. Local.

    A pass that is not recorded costs a count. What was recorded is read when the next pass finds it done: on CUDA
    nothing waits for the device.
    """

    def __init__(self, bound: float) -> None:
        self._drift = LinkDrift(bound, MIN_PASSES)
        self._recorder: Recorder = Off()
        self._num_rows = 0

    def recorder(self, device: torch.device, rank: int, plan: DispatchPlan) -> Recorder:
        """The recorder of a training pass; off for most of them."""
        if not self._drift.passes():
            return Off()
        self._recorder = make_recorder(device, rank)
        self._num_rows = sum(sum(rows) for peer, rows in enumerate(plan.send_rows_PL) if peer != rank)
        return self._recorder

    def is_beyond_bound(self) -> bool:
        """True where this rank wants another measurement."""
        if not isinstance(self._recorder, Off) and self._recorder.is_behind():
            sample = LinkSample.of(self._recorder.spans(), self._num_rows)
            self._recorder = Off()
            if sample is not None:
                self._drift.see(sample)
        return self._drift.is_beyond_bound()

    def restart(self, has_changed: bool) -> None:
        """A measurement was made, and has changed the schedule or not."""
        self._recorder = Off()
        self._drift.restart(has_changed)


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
    layer: str = ""  # its name, by which a rank that ends meanwhile is told
    measured: list[tuple[Costs, int]] = dataclasses.field(default_factory=list)  # for so many rows per rank
    rounds: Iterator[int] = dataclasses.field(default_factory=count)
    contexts: dict[str, PassContext] = dataclasses.field(default_factory=dict)  # by schedule, described

    def choose(self) -> Choice:
        """The schedule to take. Collective over the group; some 25 passes long, 50 on a busy machine."""
        with _undisturbed(self.experts, self.rows_ND.device):
            return self._choose()

    def _choose(self) -> Choice:
        # All ranks go on with the same numbers, the means: else two of them might choose two schedules, and hang.
        can_copy = self.plan.copies is not None
        config = self.config if can_copy else dataclasses.replace(self.config, two_level="off")
        priced = ranked(config, self.torus, self.measure_costs())
        predicted_us = {str(knobs): us for us, knobs in priced}
        found = benchmark(self._finalists(priced), self._benchmark)
        ratios = {name: statistics.median(found.to_serial(name)) for name in found.seconds}
        predicted = predicted_us[str(found.leader)] / max(predicted_us[str(SERIAL)], 1e-9)
        serial_ms = 1e3 * statistics.median(seconds for seconds in found.serial_s if seconds)
        ratio = ratios.pop(described(found.leader), 1.0)
        return Choice(
            knobs=found.leader,
            time_to_serial=ratio,
            predicted_to_serial=predicted,
            serial_ms=serial_ms,
            raced=ratios,
        )

    def _finalists(self, priced: Sequence[tuple[float, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
        """The schedules worth a measurement, the cheapest first: near ones, and the first of each kind.

        Of two with the same pieces and levels, which differ in their blocks of weight gradients, the cheaper one.
        """
        step_us = max(PRICE_STEP * priced[0][0], 1e-9)

        def order(item: tuple[float, Mapping[str, Any]]) -> tuple[int, int]:
            return round(item[0] / step_us), len(self._pieces(item[1]))

        of_pieces: dict[tuple[object, ...], tuple[float, Mapping[str, Any]]] = {}
        for item in sorted((item for item in priced if item[1]["schedule"] != "serial"), key=order):
            of_pieces.setdefault((item[1].get("two_level"), *self._pieces(item[1])), item)
        firsts: list[Mapping[str, Any]] = []
        for _, knobs in of_pieces.values():
            is_whole = knobs["schedule"] == "peers" and knobs["row_cuts"] == 1 and "peer_group_size" not in knobs
            # Whole groups always: what pieces cost beside rows has no price.
            if is_whole or knobs["schedule"] not in [first["schedule"] for first in firsts]:
                firsts.append(knobs)
        nearest = [knobs for us, knobs in of_pieces.values() if us <= (1 + NEAR) * priced[0][0] and knobs not in firsts]
        taken = [*firsts, *nearest][:MOST]
        return [knobs for _, knobs in of_pieces.values() if knobs in taken]

    def _pieces(self, knobs: Mapping[str, Any]) -> tuple[Piece, ...]:
        return pieces_of(dataclasses.replace(self.config, **knobs), self.torus)

    def agree(self, statements: Sequence[bool]) -> list[bool]:
        """Which of the statements hold on every rank of the group. Collective."""
        return [share == 1 for share in self._mean([float(each) for each in statements])]

    def measure_costs(self) -> Costs:
        """The mean rank's costs, the same on every rank. Collective."""
        num_rows = int(self._mean([len(self.rows_ND)])[0])
        wire_us = self._wire_us(probe_pieces(self.torus, num_rows))
        passes = [self._compute_us() for _ in range(PROBES)]
        # The least of the runs: what disturbs a measurement makes it longer, never shorter.
        nothing_us, near_us, far_us, little_us, *compute_us = self._mean(
            [*wire_us, *map(min, zip(*passes, strict=True))]
        )
        costs = Costs(
            near_us=max(near_us - little_us, 0.0),
            far_us=max(far_us - little_us, 0.0),
            latency_us=max(little_us - nothing_us, 0.0),
            forward_us=compute_us[0],
            input_grad_us=compute_us[1],
            weight_grad_us=compute_us[2],
        )
        self.measured.append((costs, num_rows))
        return costs

    def _compute_us(self) -> list[float]:
        """Microseconds of the rank's computations in one serial pass: forward, input gradients, weight gradients."""
        recorder = make_recorder(self.rows_ND.device, self.transport.rank)
        self._pass(dataclasses.replace(self._context_of(SERIAL), recorder=recorder))
        computes = [span for span in recorder.spans() if span.lane == "compute"]

        def total_us(phase: str, kind: OpKind) -> float:
            mine = [s for s in computes if s.tags.phase == phase and s.name.startswith(kind.value)]
            return sum(span.stop_us - span.start_us for span in mine)

        kinds = ("forward", OpKind.COMPUTE), ("backward", OpKind.COMPUTE), ("backward", OpKind.WEIGHTS)
        return [total_us(*kind) for kind in kinds]

    def _wire_us(self, pieces: tuple[Piece, ...]) -> list[float]:
        """Microseconds until all ranks are done: with nothing, and with a dispatch of each piece. Collective.

        Each begins when all ranks are there, and ends when all have their rows: else a rank that had the rows of one
        early would wait in the next one for those that had them late, and a latency of next to nothing be as long as
        their difference.
        """
        probe = Schedule("probe", self.torus, pieces, (), depth=0)
        context = self._context(probe, probe)
        num_rows = sum(map(sum, self.plan.send_rows_PL))  # of one level, which the probe times
        rows_ND = (
            self.rows_ND if len(self.rows_ND) == num_rows else self.rows_ND.new_zeros(num_rows, self.rows_ND.shape[1])
        )
        buffers = Buffers.of(rows_ND, context.layout, self.transport.size)
        probes = [
            probe,
            *(dataclasses.replace(probe, ops=(Op(OpKind.DISPATCH, piece),)) for piece in range(len(pieces))),
        ]
        works = [partial(run, each, context, buffers, Steps("forward", compute=_nothing)) for each in probes]
        found = [[1e6 * self._timed(work) for work in works] for _ in range(1 + WIRE_PROBES * PROBES)]
        return [min(times) for times in zip(*found[1:], strict=True)]

    def _benchmark(self, knobs: Sequence[Mapping[str, Any]], rounds: int) -> list[list[float]]:
        """Seconds of each, round by round, of the mean rank. Collective."""
        contexts = [self._context_of(each) for each in knobs]
        times: list[list[float]] = [[] for _ in knobs]
        for _ in range(rounds):
            order = list(range(len(contexts)))
            # Back and forth, so that neither a drift of the clock nor what a neighbour left in the caches favours one.
            for side in order if next(self.rounds) % 2 else order[::-1]:
                times[side].append(self._timed(partial(self._pass, contexts[side])))
        means = self._mean([seconds for side in times for seconds in side])
        return [means[i : i + rounds] for i in range(0, len(means), rounds)]

    def _timed(self, work: Callable[[], None]) -> float:
        """Seconds until all ranks have done their work, which all begin together. Collective."""
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        """Waits for the own device and for all ranks."""
        self._mean([0.0])

    def _pass(self, context: PassContext) -> None:
        """Forward and backward, weight gradients included, which are made for nobody: parameters are not asked for."""
        self._meet(Mode.TRAINING)
        rows_ND = self.rows_ND.detach().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
            both = run_experts(rows_ND, self.experts, context, self.shared, self._weights_of_copies())
        outputs = [each for each in both if each is not None]
        torch.autograd.grad(outputs, rows_ND, [torch.ones_like(rows) for rows in outputs])

    def _meet(self, mode: Mode) -> None:
        """The exchange with which a pass of training begins, where it has one. Collective.

        Ranks that wait there for each other do not go on with the next pass under the others' last transfers: without
        it a schedule that leaves transfers at the end of a pass looks better than it is.
        """
        is_backward, is_cuda = mode is Mode.BACKWARD, self.rows_ND.is_cuda
        if is_cuda and (is_backward or self.plan.maps.is_padding_N is not None):
            return
        row_type = (self.rows_ND.shape[1], self.rows_ND.dtype)
        agreement = Agreement(self.transport, Call(self.layer, mode=mode), self.config.num_experts, row_type)
        if is_backward:
            agreement.on_backward()
        else:
            counts_PL = torch.zeros(self.transport.size, self.config.num_local_experts, dtype=torch.int64)
            agreement.on_counts(counts_PL.to(self.rows_ND.device))

    def _weights_of_copies(self) -> Tensor | None:
        """Some weights, where nodes sum results: they change no time."""
        copies = self.plan.copies
        if copies is None or copies.sums is None:
            return None
        return copies.routes_UK.new_ones(copies.routes_UK.shape, dtype=torch.float32)

    def _context_of(self, knobs: Mapping[str, Any]) -> PassContext:
        """The context of a schedule's passes, the same in each round."""
        known = self.contexts.get(described(knobs))
        if known is None:
            config = dataclasses.replace(self.config, **knobs)
            schedules = forward_schedule(config, self.torus), backward_schedule(config, self.torus)
            known = self.contexts[described(knobs)] = self._context(*schedules)
        return known

    def _context(self, forward: Schedule, backward: Schedule) -> PassContext:
        num_shared = 0 if self.shared is None else len(self.shared.x_TD)
        group_sizes = grouped_experts(self.config, self.experts, (forward, backward), self.rows_ND, self.plan)
        layout = lay_out(self.plan, forward, self.transport.rank, num_shared, group_sizes)
        in_triton = use_triton(self.config, self.rows_ND.device)
        links, meet = (self.transport, self.lanes, Off()), partial(self._meet, Mode.BACKWARD)
        return PassContext(layout, forward, backward, *links, in_triton, self.layer, meet, self.plan.copies)

    def _mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the ranks. Collective; waits for the device."""
        told = torch.tensor(values, dtype=torch.float32, device=self.rows_ND.device)
        summed = self.transport.sum(told, Tags(self.layer))
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
