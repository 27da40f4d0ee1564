"""The probe's measurements between ranks: exchanges by size, near and far, and on a CPU the core time of messages.

A message is an exchange: both ranks of a pair send and receive at once, as in a dispatch. First one pair alone, then
all pairs, so that a link which ranks share shows.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.bench.probe.clock import LEAST, MOST, RankProbe

SHARES = {"links": 0.32, "host": 0.06}  # of the probe's time
MESSAGE_BYTES = (8, *(2**n for n in range(10, 29, 2)))  # 8 bytes, 1 KiB to 256 MiB
SMALL_BYTES = 2**16  # beyond it bytes rule, and the next size can be foretold
TINY_BYTES, WIDE_BYTES = 64, 2**20  # messages whose core time is counted
MESSAGES = 50  # of one such sample

Pairs = list[tuple[int, int]]


def measure(probe: RankProbe) -> None:
    """Every way that there is; with one rank there is none. Collective."""
    ways = ways_of(probe.nodes)
    lines: list[tuple[str, str, Pairs]] = []
    for way, pairs in ways.items():
        lines += [(way, "one", pairs[:1])] * bool(pairs) + [(way, "all", pairs)] * (len(pairs) > 1)
        if pairs:
            senders = sum(probe.nodes[rank] == probe.nodes[pairs[0][0]] for pair in pairs for rank in pair)
            probe.found(f"{way}.senders", [float(senders)])
    for way, load, pairs in lines:
        probe.phase(f"{way} links, {'a pair alone' if load == 'one' else 'all pairs'}")
        line(probe, f"{way}.{load}", pairs, SHARES["links"] * probe.plan.seconds / len(lines))
    if probe.device.type == "cpu" and lines:
        host(probe, lines[0][2])


def ways_of(nodes: Sequence[int]) -> dict[str, Pairs]:
    """Disjoint pairs of ranks by way: neighbours on a node, and ranks in the same place of two nodes.

    `nodes` has the node of every rank.
    """
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    groups = list(by_node.values())
    near = [pair for group in groups for pair in zip(group[::2], group[1::2], strict=False)]
    far = [pair for two in zip(groups[::2], groups[1::2], strict=False) for pair in zip(*two, strict=False)]
    return {"near": near, "far": far}


def line(probe: RankProbe, name: str, pairs: Pairs, budget_s: float) -> None:
    """Microseconds of an exchange by its bytes one way. Collective."""
    peer = _peer_in(pairs, probe.rank)
    left_s, last_s, last_bytes = budget_s, 0.0, 1
    for index, num_bytes in enumerate(MESSAGE_BYTES):
        if last_bytes >= SMALL_BYTES and last_s * num_bytes / last_bytes * (LEAST + 2) > left_s:
            break
        run = _exchange(probe, peer, num_bytes)
        seconds = probe.samples(run, left_s / (len(MESSAGE_BYTES) - index))
        left_s, last_s, last_bytes = left_s - probe.spent_s(seconds), seconds[-1], num_bytes
        probe.found(f"{name}.bytes{num_bytes}", [1e6 * s for s in seconds])


def host(probe: RankProbe, pairs: Pairs) -> None:
    """Core time of messages on a CPU, both ends, with the threads of the library that carries them. Collective."""
    probe.phase("core time of messages")
    peer, size = _peer_in(pairs, probe.rank), probe.plan.num_ranks
    budget_s = SHARES["host"] * probe.plan.seconds / 3
    tiny, wide = _exchange(probe, peer, TINY_BYTES), _exchange(probe, peer, WIDE_BYTES)
    pairwise_us = _core_us(probe, tiny, 2, budget_s)
    message_us = statistics.median(pairwise_us)
    byte_us = [max(0.0, us - message_us) / WIDE_BYTES for us in _core_us(probe, wide, 2, budget_s)]
    out, into = (torch.zeros(size * TINY_BYTES, dtype=torch.uint8) for _ in range(2))
    collective_us = _core_us(probe, partial(dist.all_to_all_single, into, out), size * (size - 1), budget_s)
    probe.found("host.cores", [float(len(os.sched_getaffinity(0)))])
    probe.found("host.pairwise", pairwise_us)
    probe.found("host.byte", [1e6 * us for us in byte_us])
    probe.found("host.collective", collective_us)


def _core_us(probe: RankProbe, run: Callable[[], object], messages: int, budget_s: float) -> list[float]:
    """Core time of a message in microseconds; one `run` of all ranks sends so many. Collective."""
    found, spent_s = list[float](), 0.0
    run()
    while len(found) < LEAST or (spent_s < budget_s and len(found) < MOST):
        dist.barrier()
        begin, core_s = time.perf_counter(), time.process_time()
        for _ in range(MESSAGES):
            run()
        of_all = torch.tensor([time.process_time() - core_s], dtype=torch.float64)
        spent_s += probe.slowest([time.perf_counter() - begin])[0]
        dist.all_reduce(of_all)
        found.append(1e6 * float(of_all) / MESSAGES / messages)
    return found


def _peer_in(pairs: Pairs, rank: int) -> int | None:
    """With whom this rank talks, if it does."""
    return next((low + high - rank for low, high in pairs if rank in (low, high)), None)


def _exchange(probe: RankProbe, peer: int | None, num_bytes: int) -> Callable[[], object]:
    """Sends and receives so much at once. On CUDA the current stream waits for both, on a CPU the caller."""
    if peer is None:
        return _nothing
    out, into = (torch.zeros(num_bytes, dtype=torch.uint8, device=probe.device) for _ in range(2))
    return partial(_exchange_on_host if probe.device.type == "cpu" else _exchange_on_cuda, out, into, peer)


def _nothing() -> None:
    return None


def _exchange_on_cuda(out: Tensor, into: Tensor, peer: int) -> None:
    """In one NCCL group, as the layer's transport does it."""
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]):
        work.wait()


def _exchange_on_host(out: Tensor, into: Tensor, peer: int) -> None:
    """As the layer's transport does it, without torch's wrappers, which cost the processor as much as gloo does."""
    group = dist.group.WORLD
    assert group is not None
    for work in (group.recv([into], peer, 0), group.send([out], peer, 0)):
        work.wait()
