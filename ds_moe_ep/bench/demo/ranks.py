"""What each rank of the demo does: the real layer over an emulated link, or the end of a rank."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep.bench.demo.links import Paced, Uplink
from ds_moe_ep.bench.demo.plan import (
    HIDDEN_SIZE,
    NUM_RANKS,
    NUM_TOKENS,
    PHASES,
    RANKS_PER_NODE,
    SIDES,
    TIMEOUT_S,
    WARM_UPS,
    DemoPlan,
)
from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import Finding, live_as_rank, loopback_environment
from ds_moe_ep.bench.overlap.ranks import Contender
from ds_moe_ep.bench.rivals.cases import LayerCase, gate_weight, output_gradient, tokens
from ds_moe_ep.bench.rivals.emulated import EmulatedDevice, EmulatedExperts
from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.recorder import HostRecorder
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import torus_of
from ds_moe_ep.errors import PeerError
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import Span, line_of

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


def _run(rank: int, plan: DemoPlan, findings: Queue[Finding], tell: Callable[[Finding], object]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    config = MoEConfig(num_experts=NUM_RANKS, ep_size=NUM_RANKS, node_size=RANKS_PER_NODE, timeout_s=TIMEOUT_S)
    transport = _paced(open_transport([range(NUM_RANKS)], config), plan)
    device = EmulatedDevice() if rank != plan.victim else MortalDevice()
    sides = {name: _contender(name, config, plan, transport, device) for name in SIDES}
    if plan.victim is None:
        _measure(plan, sides, tell)
        dist.barrier()
        dist.destroy_process_group()
    else:
        tell(Finding("", "", "phase", text=f"waiting for the end of rank {plan.victim}"))
        _outlive(rank, sides["overlapped"], device, findings)


def _paced(transport: Transport, plan: DemoPlan) -> Paced:
    """The transport behind the uplink of its rank's nominal node."""
    node = transport.rank // RANKS_PER_NODE
    far = frozenset(peer for peer in range(transport.size) if peer // RANKS_PER_NODE != node)
    return Paced(transport, Uplink(Path(plan.folder) / f"node{node}", plan.bytes_per_s), far)


def _contender(name: str, config: MoEConfig, plan: DemoPlan, transport: Transport, device: EmulatedDevice) -> Contender:
    """One layer on the schedule of the side `name`, with emulated experts and this rank's tokens."""
    layer = ExpertParallel(HIDDEN_SIZE, nn.Identity(), replace(config, **SIDES[name]))
    layer.experts = EmulatedExperts(config.num_local_experts, 1e3 * plan.compute_ms / CASE.num_rows, device)
    with torch.no_grad():
        layer.gate.wg.weight.copy_(gate_weight(CASE))
    layer.connect(transport, torus_of(range(NUM_RANKS), RANKS_PER_NODE))
    layer.dispatcher.rename(f"emulated {name}")
    recorder = HostRecorder(transport.rank)
    layer.dispatcher.record(recorder)
    x_TD = tokens(CASE, transport.rank).requires_grad_()
    return Contender(layer, x_TD, output_gradient(CASE, transport.rank), recorder)


def _measure(plan: DemoPlan, sides: Mapping[str, Contender], tell: Callable[[Finding], object]) -> None:
    """Alternating rounds. Each step's seconds, of the slowest rank, and its spans, of all ranks, are told."""
    gc.collect()
    gc.freeze()
    for index in range(WARM_UPS + plan.rounds):
        tell(Finding("", "", "phase", text=f"round {index - WARM_UPS + 1} of {plan.rounds}" if index else "warming up"))
        for name in rotation(tuple(sides), index):
            sides[name].step()
            recorder = sides[name].recorder
            assert recorder is not None
            everyones: list[tuple[dict[str, float], list[Span]]] = [({}, [])] * NUM_RANKS
            dist.all_gather_object(everyones, (sides[name].seconds, recorder.spans()))
            if index >= WARM_UPS:
                slowest = tuple(max(seconds[phase] for seconds, _ in everyones) for phase in PHASES)
                lines = (line_of(span) for _, spans in everyones for span in spans)
                tell(Finding(f"{index - WARM_UPS}", name, "turn", slowest, "\n".join(lines)))


class MortalDevice(EmulatedDevice):
    """A device whose process ends as by SIGKILL at its next work, once `is_doomed`."""

    is_doomed = False

    def work(self, rows: int, row_us: float) -> None:
        if self.is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        super().work(rows, row_us)


def _outlive(rank: int, side: Contender, device: EmulatedDevice, findings: Queue[Finding]) -> None:
    """A pass in which all live, then one in which a rank dies; what the layer says of it is told, with the moment."""
    side.step()
    if isinstance(device, MortalDevice):
        device.is_doomed = True
    try:
        side.step()
    except PeerError as error:
        findings.put(Finding("", f"rank {rank}", "said", (time.monotonic(),), str(error)))
