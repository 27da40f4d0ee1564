"""The life of a rank of a soak: trains step after step, looks at its process now and then, hashes what it computed.

1. What a process has open is counted before the engine is made, once it has settled, at the last step, and after the
   engine and all groups are gone. The group of the world, and the watch that lives with it, are there all the time.
2. Counts of Python objects, and peaks of memory, begin with the first sample: objects that are alive by then are put
   aside (gc.freeze).
3. Losses and loads are kept on the rank between samples, and exchanged with them.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank, loopback_environment
from ds_moe_ep.bench.meters.memory import HostMeter
from tests.soak.plan import SoakPlan

START_TIMEOUT_S = 600.0
PATIENCE_S = 10.0  # for threads that were told to end
LOOKS, LOOK_S = 3, 0.02  # at what a process holds

MALLINFO_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

# Torch keeps the products of the last 1,024 shapes, and a record of the last 2,000 collectives: about 4 MB per rank
# that come in the first hundreds of steps and are no leak.
CACHES_OFF = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "TORCH_FR_BUFFER_SIZE": "0"}


def run_soak_rank(rank: int, plan: SoakPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    os.environ |= loopback_environment(rank, plan.num_ranks, plan.port)
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if not plan.has_caches:
        os.environ |= CACHES_OFF
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, plan))


def _run(plan: SoakPlan, tell: Tell) -> None:
    soak(plan, tell)
    dist.barrier()
    dist.destroy_process_group()


def soak(plan: SoakPlan, tell: Tell, make_model: Callable[[SoakPlan], nn.Module] | None = None) -> None:
    """One run on this rank; `make_model` makes another model than the soak's own. Collective over the world.

    `tell` hears of each step, and at every sample of what all ranks hold.
    """
    from ds_moe_ep.bench.candidates import native  # imports deepspeed, which reads DS_ACCELERATOR
    from ds_moe_ep.engine import seams
    from tests.soak.model import SoakModel, build_engine

    native.start_ranks("gloo", START_TIMEOUT_S)
    tell(Finding("phase", "building the engine"))
    seams.watch_of_world(plan.moe(0).timeout_s)
    dist.barrier()
    before = opened()
    tell_all(plan, before, "start", tell)
    engine = build_engine(plan, make_model or SoakModel)
    train(engine, plan, tell)
    tell_all(plan, {"peak": HostMeter().peak()}, "memory", tell)
    engine.destroy()
    del engine
    close_groups()
    tell_all(plan, left_open(before), "after", tell)


def train(engine: Any, plan: SoakPlan, tell: Tell) -> None:
    """All steps of a run. Collective."""
    from tests.soak.model import RoutingWorkload

    workload, journal, rank = RoutingWorkload(plan), Journal(plan), dist.get_rank()
    samples, hashes = set(plan.samples()), set(plan.hashes())
    for step in range(1, plan.steps + 1):
        output = engine(*workload.batch(step, rank))
        engine.backward(output.loss)
        engine.step()
        journal.note(output.loss, output.counts_E)
        del output
        if step in samples:
            journal.tell_loads(step, tell)
            if step == plan.samples()[0]:
                gc.collect()
                gc.freeze()
                HostMeter().reset()  # the peak of building and of the first steps is not that of the bursts
            tell_all(plan, held(), f"step{step:05d}", tell)
            for when, its_step in (("steady", plan.steady_step), ("end", plan.steps)):
                if step == its_step:
                    tell_all(plan, opened(), when, tell)
        if step in hashes:
            journal.tell_hash(step, engine.module, tell)
        tell(Finding("phase", f"step {step}", advance=1))
    gc.unfreeze()


def held() -> Mapping[str, float]:
    """Holdings of this process: resident bytes, bytes out of malloc, live tensors and Python objects.

    Garbage that waits for the collector is collected first. Objects that were put aside do not count, nor those that a
    thread of a transfer or of a collective lets go a moment later: the least of some looks counts.
    """
    looks = [_look()]
    for _ in range(LOOKS - 1):
        time.sleep(LOOK_S)
        looks.append(_look())
    return {what: min(look[what] for look in looks) for what in looks[0]}


def _look() -> Mapping[str, float]:
    gc.collect()
    objects = gc.get_objects()
    return {
        "memory": psutil.Process().memory_info().rss,
        "allocated": malloc_bytes(),
        "tensors": sum(issubclass(type(o), Tensor) for o in objects),
        "objects": len(objects),
    }


def opened() -> Mapping[str, float]:
    """Open handles of this process, sockets among them, and threads."""
    process = psutil.Process()
    return {
        "handles": process.num_fds(),
        "sockets": len(process.net_connections(kind="all")),
        "threads": process.num_threads(),
    }


def left_open(before: Mapping[str, float]) -> Mapping[str, float]:
    """As `opened`, once that is no more than before, or after some seconds: threads that end need a moment."""
    deadline_s = time.monotonic() + PATIENCE_S
    while any(now > before[what] for what, now in opened().items()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return opened()


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO_FIELDS]


def malloc_bytes() -> float:
    """Bytes that malloc has given out and not got back, in all arenas; 0 where the C library cannot tell."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0.0
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return float(info.uordblks + info.hblkhd)


def tell_all(plan: SoakPlan, values: Mapping[str, float], when: str, tell: Tell) -> None:
    """Tells the values of all ranks, in rank order. Collective."""
    here = torch.tensor(list(values.values()), dtype=torch.float64)
    of_ranks = zip(values, gathered(here).t().tolist(), strict=True)
    tell(Finding(samples={f"{plan.prefix}.{what}.{when}": tuple(of_each) for what, of_each in of_ranks}))


def gathered(here: Tensor) -> Tensor:
    """The values of all ranks [P, ...], in rank order. Collective."""
    everywhere = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, here)
    return torch.stack(everywhere)


class Journal:
    """Record of what this rank computed: a running hash of all of it, and what was not told yet."""

    def __init__(self, plan: SoakPlan) -> None:
        self._plan = plan
        self._seen = hashlib.sha256()
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []

    def note(self, loss: Tensor, counts_E: Tensor) -> None:
        """Takes in one step."""
        self._losses.append(loss.detach())
        self._counts.append(counts_E)
        self._seen.update(bytes_of(loss) + bytes_of(counts_E))

    def tell_loads(self, step: int, tell: Tell) -> None:
        """Tells the rows of each expert and the mean loss, of all ranks, of each step not told yet. Collective."""
        rows_SE, loss_S = torch.stack(self._counts), torch.stack(self._losses).double()
        dist.all_reduce(rows_SE)
        dist.all_reduce(loss_S)
        first = step + 1 - len(self._counts)
        self._losses, self._counts = [], []
        samples: dict[str, tuple[float, ...]] = {}
        for its_step, (rows_E, loss) in enumerate(zip(rows_SE.tolist(), loss_S.tolist(), strict=True), start=first):
            samples[f"{self._plan.prefix}.rows.step{its_step:05d}"] = tuple(map(float, rows_E))
            samples[f"{self._plan.prefix}.loss.step{its_step:05d}"] = (loss / dist.get_world_size(),)
        tell(Finding(samples=samples))

    def tell_hash(self, step: int, model: nn.Module, tell: Tell) -> None:
        """Tells one hash of all losses and loads until now and of all parameters, on all ranks. Collective."""
        here = self._seen.copy()
        for parameter in model.parameters():
            here.update(bytes_of(parameter))
        digest = torch.frombuffer(bytearray(here.digest()), dtype=torch.uint8)
        text = hashlib.sha256(bytes_of(gathered(digest))).hexdigest()
        tell(Finding(f"{self._plan.prefix}.hash.step{step:05d}", text))


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a tensor, bit by bit."""
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()


def close_groups() -> None:
    """Closes every process group but the world's, with DeepSpeed's references to them. Collective.

    DeepSpeed keeps groups, and with them our lanes, for the next engine; they end with the process or by this.
    """
    import deepspeed.comm
    from torch.distributed import distributed_c10d

    gc.collect()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            deepspeed.comm.destroy_process_group(group)
    gc.collect()
