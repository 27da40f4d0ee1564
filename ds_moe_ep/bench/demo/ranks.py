"""The life of a rank of the demo: the real layer over an emulated link, or the end of a rank."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep.bench.candidates.cases import LayerCase
from ds_moe_ep.bench.candidates.emulated import EmulatedDevice, EmulatedExperts
from ds_moe_ep.bench.candidates.layers import LayerCandidate, LayerSetup, candidate_of, load_weights
from ds_moe_ep.bench.demo.links import Paced, Uplink
from ds_moe_ep.bench.demo.plan import (
    CANDIDATES,
    HIDDEN_SIZE,
    NUM_RANKS,
    NUM_TOKENS,
    PHASES,
    RANKS_PER_NODE,
    TIMEOUT_S,
    WARM_UPS,
    DemoPlan,
)
from ds_moe_ep.bench.demo.results import MeasuredStep
from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank, loopback_environment
from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import torus_of
from ds_moe_ep.errors import PeerError
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import Span

CASE = LayerCase(
    name="demo",
    top_k=1,
    load="even",
    hidden_size=HIDDEN_SIZE,
    num_experts=NUM_RANKS,
    num_tokens=NUM_TOKENS,
)


def live(rank: int, plan: DemoPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    os.environ |= loopback_environment(rank, NUM_RANKS, plan.port)
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, rank, plan, findings))


def _run(rank: int, plan: DemoPlan, findings: Queue[Finding], tell: Tell) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    config = MoEConfig(num_experts=NUM_RANKS, ep_size=NUM_RANKS, node_size=RANKS_PER_NODE, timeout_s=TIMEOUT_S)
    transport = _paced(open_transport([range(NUM_RANKS)], config), plan)
    device = EmulatedDevice() if rank != plan.victim else MortalDevice()
    candidates = {name: _build(name, config, plan, transport, device) for name in CANDIDATES}
    if plan.victim is None:
        _measure(plan, candidates, tell)
        dist.barrier()
        dist.destroy_process_group()
    else:
        tell(Finding("phase", f"waiting for the end of rank {plan.victim}"))
        _outlive(rank, candidates["overlapped"], device, findings)


def _paced(transport: Transport, plan: DemoPlan) -> Paced:
    """The transport behind the uplink of its rank's nominal node."""
    node = transport.rank // RANKS_PER_NODE
    far = frozenset(peer for peer in range(transport.size) if peer // RANKS_PER_NODE != node)
    return Paced(transport, Uplink(Path(plan.folder) / f"node{node}", plan.bytes_per_s), far)


def _build(
    name: str, config: MoEConfig, plan: DemoPlan, transport: Transport, device: EmulatedDevice
) -> LayerCandidate:
    """One layer on the schedule `name`, with emulated experts and this rank's tokens."""
    row_us = 1e3 * plan.compute_ms / CASE.num_rows
    setup = LayerSetup(case=CASE, rank=transport.rank, num_ranks=NUM_RANKS, row_us=row_us, is_recorded=True)
    layer = ExpertParallel(HIDDEN_SIZE, nn.Identity(), replace(config, **CANDIDATES[name]))
    layer.experts = EmulatedExperts(config.num_local_experts, row_us, device)
    layer.connect(transport, torus_of(range(NUM_RANKS), RANKS_PER_NODE))
    layer.dispatcher.rename(f"emulated {name}")
    return candidate_of(load_weights(layer, setup), setup)


def _measure(plan: DemoPlan, candidates: Mapping[str, LayerCandidate], tell: Tell) -> None:
    """Alternating rounds. Each step's seconds, of the slowest rank, and its spans, of all ranks, are told."""
    gc.collect()
    gc.freeze()
    for index in range(WARM_UPS + plan.rounds):
        tell(Finding("phase", f"round {index - WARM_UPS + 1} of {plan.rounds}" if index else "warming up"))
        for name in rotation(tuple(candidates), index):
            _step(candidates[name])
            recorder = candidates[name].recorder
            assert recorder is not None
            everyones: list[tuple[dict[str, float], list[Span]]] = [({}, [])] * NUM_RANKS
            dist.all_gather_object(everyones, (candidates[name].seconds, recorder.spans()))
            if index >= WARM_UPS:
                slowest = {phase: max(seconds[phase] for seconds, _ in everyones) for phase in PHASES}
                tell(MeasuredStep(name, slowest, tuple(span for _, spans in everyones for span in spans)).finding())


def _step(candidate: LayerCandidate) -> None:
    candidate.prepare()
    dist.barrier()
    candidate.run()


class MortalDevice(EmulatedDevice):
    """A device whose process ends as by SIGKILL at its next work, once `is_doomed`."""

    is_doomed = False

    def work(self, rows: int, row_us: float) -> None:
        if self.is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        super().work(rows, row_us)


def _outlive(rank: int, candidate: LayerCandidate, device: EmulatedDevice, findings: Queue[Finding]) -> None:
    """A pass in which all live, then one in which a rank dies; the layer's error is told, with the moment."""
    _step(candidate)
    if isinstance(device, MortalDevice):
        device.is_doomed = True
    try:
        _step(candidate)
    except PeerError as error:
        findings.put(Finding("said", str(error), {"at": (time.monotonic(),)}, rank=rank))
