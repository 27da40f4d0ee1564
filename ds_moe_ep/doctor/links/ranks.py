"""The ranks' part in the trial of links, in a job's processes or in ranks of the doctor's own.

1. Every rank tells a store that it is up. Rank 0 waits for all, at most `start_s`, and publishes who came. Where
   all did, every rank derives the same list of pairs.
2. In a thread, ranks form a group and try one pair after the other, so that no pair disturbs another; the lower rank of
   a pair measures and tells the store. A thread, because a transfer may never end.
3. Rank 0 collects until all are done, have failed, or time is up, and leaves last, since it serves the store.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ds_moe_ep.comm.launcher import World
from ds_moe_ep.doctor.gather import installed
from ds_moe_ep.doctor.links.outcome import LinksOutcome, LinkTrial, Presence, TriedLink
from ds_moe_ep.doctor.links.verdicts import pairs_to_try, reaches
from ds_moe_ep.doctor.probe import named

# What every rank should have alike.
RELEASES = ("torch", "deepspeed", "ds-moe-ep")
VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NCCL_NTHREADS", "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
)  # fmt: skip
MOST_PAIRS = 128
POLL_S = 0.05
GRACE_S = 5.0  # how long others may take to end after the first failure
PROBE_BYTES = 1 << 18
LEAST_BYTES, MOST_BYTES = 1 << 16, 1 << 28
LARGE_TRIPS = 3
BATCHES = 9


def try_links(world: World, trial: LinkTrial) -> LinksOutcome:
    """Outcome at the end: everything on rank 0, this rank's own state on the others. Ends in time on each."""
    known: list[LinksOutcome] = []
    thread = threading.Thread(target=lambda: known.append(_meet_and_try(world, trial)), daemon=True)
    thread.start()
    thread.join(3 * trial.start_s + 2 * trial.limit_s)
    silent = LinksOutcome(world_size=world.size, failed={world.rank: "it hangs before its first transfer"}, stuck=True)
    return known[0] if known else silent


def _meet_and_try(world: World, trial: LinkTrial) -> LinksOutcome:
    begin = time.monotonic()
    try:
        gpus = torch.cuda.device_count() if world.wants_gpu else 0
        store = _connect(world, trial, serves=world.serves_store)
        presence = Presence(
            host=socket.gethostname(),
            has_gpu=gpus > world.local_rank,
            versions=installed(RELEASES),
            variables={name: os.environ.get(name) for name in VARIABLES},
        )
        store.set(_key("up", world.rank), json.dumps(vars(presence)))
        up = _wait_for_all(store, world, trial.start_s)
    except Exception as error:
        return LinksOutcome(world_size=world.size, failed={world.rank: named(error)})
    backend = "nccl" if all(presence.has_gpu for presence in up.values()) else "gloo"
    known = LinksOutcome(backend=backend, world_size=world.size, up=up, waited_s=time.monotonic() - begin)
    if known.missing:
        return known
    hosts = {rank: presence.host for rank, presence in up.items()}
    pairs = pairs_to_try(reaches(trial.groups, trial.node_size, hosts), MOST_PAIRS)
    theirs = _connect(world, trial, serves=False)  # a store's client serves one thread at a time
    thread = threading.Thread(target=_measure_safely, args=(world, trial, backend, pairs, theirs), daemon=True)
    thread.start()
    if world.rank == 0:
        known = _collect(store, known, pairs, trial.limit_s)
    thread.join(0.0 if known.silent else trial.limit_s)
    return replace(known, stuck=thread.is_alive())


def _connect(world: World, trial: LinkTrial, *, serves: bool) -> TCPStore:
    limit = timedelta(seconds=trial.start_s)
    return TCPStore(
        world.address, world.port, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True
    )


def _key(what: str, *ranks: int) -> str:
    return "/".join(["doctor", what, *map(str, ranks)])


def _wait_for_all(store: TCPStore, world: World, limit_s: float) -> dict[int, Presence]:
    """On rank 0 who is up, at the latest after `limit_s`; the others are told by what rank 0 publishes."""
    keys = {rank: _key("up", rank) for rank in range(world.size)}
    if world.rank == 0:
        deadline = time.monotonic() + limit_s
        while not store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
        store.set(_key("all"), json.dumps(list(keys)))
    else:
        store.wait([_key("all")], timedelta(seconds=2 * limit_s))
        keys = {rank: keys[rank] for rank in json.loads(store.get(_key("all")))}
    return {rank: Presence(**json.loads(store.get(key))) for rank, key in keys.items()}


def _collect(store: TCPStore, known: LinksOutcome, pairs: Sequence[tuple[int, int]], limit_s: float) -> LinksOutcome:
    """Everything that the ranks tell the store, until all have ended or `limit_s` is over."""
    waiting, failed = set(range(known.world_size)), dict[int, str]()
    deadline = time.monotonic() + limit_s
    while waiting and time.monotonic() < deadline:
        for rank in sorted(waiting):
            if store.check([_key("ended", rank)]):
                waiting.remove(rank)
                error = store.get(_key("ended", rank)).decode()
                if error:
                    failed[rank] = error
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    measured = [pair for pair in pairs if store.check([_key("pair", *pair)])]
    links = tuple(TriedLink(*pair, *json.loads(store.get(_key("pair", *pair)))) for pair in measured)
    hung = next((pair for pair in pairs if pair not in measured), None) if waiting else None
    return replace(known, links=links, failed=failed, silent=tuple(sorted(waiting)), hung=hung)


def _measure_safely(
    world: World, trial: LinkTrial, backend: str, pairs: Sequence[tuple[int, int]], store: Store
) -> None:
    try:
        _measure(world, trial, backend, pairs, store)
        error = ""
    except Exception as raised:
        error = named(raised)
    with suppress(RuntimeError):  # rank 0, which serves the store, may have gone
        store.set(_key("ended", world.rank), error)


def _measure(world: World, trial: LinkTrial, backend: str, pairs: Sequence[tuple[int, int]], store: Store) -> None:
    """This rank's part: it leads a pair, follows in one, or waits at the barrier between two."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=PrefixStore("doctor/group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=trial.limit_s),
    )
    dist.barrier()  # NCCL wants every rank in a group's first call
    for low, high in pairs:
        if world.rank == low:
            link = _lead(high, device, trial.seconds / len(pairs))
            store.set(_key("pair", low, high), json.dumps(link))
        elif world.rank == high:
            _follow(low, device)
        dist.barrier()
    dist.destroy_process_group()


def _lead(peer: int, device: torch.device, budget_s: float) -> tuple[float, float]:
    """Half a round trip of one byte in us, and the rate of a large message in GB/s."""
    byte, trips = torch.zeros(1, dtype=torch.uint8, device=device), _trips(device)
    _round_trips(peer, byte, trips, leads=True)
    latency_s = statistics.median(_timed(peer, byte, trips) for _ in range(BATCHES))
    some = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    _round_trips(peer, some, 1, leads=True)
    rate = PROBE_BYTES / _timed(peer, some, 1)
    size = int(min(MOST_BYTES, max(LEAST_BYTES, rate * budget_s / (4 * LARGE_TRIPS))))
    _move(torch.tensor([size], dtype=torch.int64, device=device), peer, sends=True)
    large = torch.zeros(size, dtype=torch.uint8, device=device)
    _round_trips(peer, large, 1, leads=True)
    large_s = statistics.median(_timed(peer, large, 1) for _ in range(LARGE_TRIPS))
    return latency_s * 1e6, size / large_s / 1e9


def _follow(peer: int, device: torch.device) -> None:
    """The other end of `_lead`."""
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    for _ in range(1 + BATCHES):
        _round_trips(peer, byte, _trips(device), leads=False)
    some = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    for _ in range(2):
        _round_trips(peer, some, 1, leads=False)
    size = torch.zeros(1, dtype=torch.int64, device=device)
    _move(size, peer, sends=False)
    large = torch.zeros(int(size.item()), dtype=torch.uint8, device=device)
    for _ in range(1 + LARGE_TRIPS):
        _round_trips(peer, large, 1, leads=False)


def _trips(device: torch.device) -> int:
    """Round trips between two looks at the clock: on a GPU the host's wait must not weigh in each."""
    return 20 if device.type == "cuda" else 1


def _timed(peer: int, message: torch.Tensor, trips: int) -> float:
    """Seconds of one way."""
    start = time.perf_counter()
    _round_trips(peer, message, trips, leads=True)
    return (time.perf_counter() - start) / trips / 2


def _round_trips(peer: int, message: torch.Tensor, trips: int, *, leads: bool) -> None:
    for _ in range(trips):
        _move(message, peer, sends=leads)
        _move(message, peer, sends=not leads)
    if message.is_cuda:
        torch.cuda.synchronize(message.device)


def _move(message: torch.Tensor, peer: int, *, sends: bool) -> None:
    """One message. Batched as the layer's are, so that NCCL uses the group's communicator and makes none per pair."""
    way: Callable[..., object] = dist.isend if sends else dist.irecv
    for work in dist.batch_isend_irecv([dist.P2POp(way, message, peer)]):
        work.wait()
