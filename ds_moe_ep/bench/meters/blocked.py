"""Where a step's wall time goes, for any system: the seconds that its thread is blocked in communication, by label.

Every path of torch.distributed and deepspeed.comm ends in a method of ProcessGroup, and every wait in Work.wait;
`blocked` wraps those while it is open. It does not wrap torch.distributed's functions: DeepSpeed binds some when its
backend starts, and torch itself compares others by identity (P2POp, coalescing), which a wrapper would break.

1. A call of a ProcessGroup method gets a label, and its time counts. On gloo it returns at once, with a Work.
2. The wait for that Work counts for the same label, whether torch waits (a blocking call) or the system does, later.
3. Only the thread that opened the block counts, and threads in which autograd runs a backward pass (on CUDA its own).
   Lanes' threads move rows behind compute: what of that the step waits for is the overlap recorder's exposed time.

On CUDA a wait orders streams and returns: these are seconds of the host, and gloo's ranks are what they explain.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup, Work

from ds_moe_ep.bench.meters.wrapped import Method, wrapped
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import PARTS

# ProcessGroup's methods by the function of torch.distributed that calls them.
METHODS: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "reduce": ("reduce",),
    "broadcast": ("broadcast",),
    "all_gather": ("allgather", "allgather_coalesced"),
    "all_gather_into_tensor": (
        "_allgather_base",
        "all_gather_single",
        "all_gather_single_coalesced",
        "allgather_into_tensor_coalesced",
    ),
    "gather": ("gather",),
    "scatter": ("scatter",),
    "reduce_scatter": ("reduce_scatter",),
    "reduce_scatter_tensor": (
        "_reduce_scatter_base",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
    ),
    "all_to_all_single": ("alltoall_base", "all_to_all_single"),
    "all_to_all": ("alltoall",),
    "send": ("send",),
    "recv": ("recv", "recv_anysource"),
    "barrier": ("barrier", "monitored_barrier"),
    "batch_isend_irecv": ("_end_coalescing",),  # NCCL's; on gloo it is sends and receives
}
UNSEEN = "wait"  # what a label function is told for a handle that was started outside the block

# (function of torch.distributed, ranks of its group, the group) -> one of names.PARTS, a name of one's own, or None
# for what is not to be counted, since it is accounted for elsewhere. A handle of before has no ranks and no group.
Label = Callable[[str, int, ProcessGroup | None], str | None]


@dataclass
class OwnTime:
    """Seconds of a block without those in which it was blocked."""

    seconds: float = 0.0


class Blocked:
    """Blocked seconds of one thread by label; they grow while the block runs."""

    def __init__(self, label: Label) -> None:
        self.seconds: dict[str, float] = {}
        self._label = label
        self._caller = threading.get_ident()
        self._started: WeakKeyDictionary[Work, str | None] = WeakKeyDictionary()
        self._inside = threading.local()  # one method may be written in terms of another: the outermost counts
        self._lock = threading.Lock()

    @property
    def total_s(self) -> float:
        """The sum over the labels."""
        return sum(self.seconds.values())

    @contextmanager
    def own_time(self) -> Iterator[OwnTime]:
        """The wall time of the block less what was counted as blocked in it: an optimizer's own seconds, say."""
        own, before_s, start_s = OwnTime(), self.total_s, time.perf_counter()
        try:
            yield own
        finally:
            own.seconds = time.perf_counter() - start_s - (self.total_s - before_s)

    def call(self, function: str, method: Callable[..., Any], group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        """Result of the group's method; its time counts, and the handle's will."""
        if not self._counts_here():
            return method(group, *args, **kwargs)
        label = self._label(function, group.size(), group)
        work = self._timed(label, method, group, *args, **kwargs)
        if isinstance(work, Work):
            with self._lock:
                self._started[work] = label
        return work

    def wait(self, method: Callable[..., Any], work: Work, *args: Any, **kwargs: Any) -> Any:
        """Result of the handle's wait; its time counts for the label of the call that started it."""
        if not self._counts_here():
            return method(work, *args, **kwargs)
        with self._lock:
            is_known, label = work in self._started, self._started.get(work)
        return self._timed(label if is_known else self._label(UNSEEN, 0, None), method, work, *args, **kwargs)

    def _counts_here(self) -> bool:
        if getattr(self._inside, "call", False):
            return False
        return threading.get_ident() == self._caller or torch._C._current_graph_task_id() != -1

    def _timed(self, label: str | None, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inside.call = True
        start_s = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            took_s = time.perf_counter() - start_s
            self._inside.call = False
            if label is not None:
                with self._lock:
                    self.seconds[label] = self.seconds.get(label, 0.0) + took_s


@contextmanager
def blocked(label: Label) -> Iterator[Blocked]:
    """A Blocked that grows while the block runs. Local; open it in the thread that runs the step, once at a time."""
    meter = Blocked(label)
    functions = {method: function for function, methods in METHODS.items() for method in methods}

    def wrap(name: str, method: Method) -> Method:
        return lambda group, *args, **kwargs: meter.call(functions[name], method, group, *args, **kwargs)

    def wrap_wait(name: str, method: Method) -> Method:
        return lambda work, *args, **kwargs: meter.wait(method, work, *args, **kwargs)

    with wrapped(ProcessGroup, functions, wrap), wrapped(Work, ["wait"], wrap_wait):
        yield meter


@dataclass(frozen=True)
class Breakdown:
    """A step cut into names.PARTS: seconds that sum to the step's."""

    parts: Mapping[str, float]
    excess_s: float  # by which what was told exceeded the step, before all parts were scaled down to fit; 0 mostly


def break_down(
    step_s: float,
    blocked_s: Mapping[str, float],
    *,
    optimizer_s: float = 0.0,
    exposed_s: float = 0.0,
    compute_s: float | None = None,
) -> Breakdown:
    """The parts of a step of `step_s` seconds, from the blocked seconds by label and what is known beside them.

    optimizer_s: without what was blocked in it (Blocked.own_time). exposed_s: expert traffic that no compute covered
    and that `blocked` did not see, since lanes' threads moved it; a schedule that blocks moves rows in the caller's
    thread, where one of the two must be left out. compute_s: None where nothing tells; then what remains of the step
    is compute, and else it is the rest. Labels outside PARTS are part of the rest.
    Raises ConfigError for a step without time or negative seconds.
    """
    given = (*blocked_s.values(), optimizer_s, exposed_s, compute_s or 0.0)
    if step_s <= 0 or min(given) < 0:
        raise ConfigError(f"bench.step_s={step_s:g}, parts {given}: a step takes time, and no part is negative")
    parts = dict.fromkeys(PARTS, 0.0)
    for label, seconds in blocked_s.items():
        parts[label if label in PARTS else "rest"] += seconds
    parts["gradients"] += optimizer_s
    parts["experts_traffic"] += exposed_s
    parts["compute"] += compute_s or 0.0
    excess_s = max(sum(parts.values()) - step_s, 0.0)
    if excess_s:
        scale = step_s / (step_s + excess_s)
        return Breakdown({part: seconds * scale for part, seconds in parts.items()}, excess_s)
    remainder_s = step_s - sum(parts.values())
    parts["compute" if compute_s is None else "rest"] += remainder_s
    return Breakdown(parts, 0.0)
