"""Counts the bytes that a rank hands to its process groups, for whichever layer makes the calls.

Every path (torch.distributed, deepspeed.comm, point-to-point, from any thread) ends in a method of
ProcessGroup; `counted` wraps those methods while it is open. Count and time in different passes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ds_moe_ep.bench.meters.wrapped import Method, wrapped

SENDS = ("send",)
SPLITS = ("alltoall_base", "all_to_all_single", "alltoall")
COLLECTIVES = ("allreduce", "allgather", "_allgather_base", "broadcast", "reduce_scatter")
COUNTED = (*SENDS, *SPLITS, *COLLECTIVES)


@dataclass
class Traffic:
    """Bytes and calls of one rank: what all-to-all gives to other ranks; the payload of a reduction once."""

    row_bytes: int = 0  # send and all-to-all
    collective_bytes: int = 0
    calls: dict[str, int] = field(default_factory=dict)


@contextmanager
def counted() -> Iterator[Traffic]:
    """A Traffic that grows while the block runs."""
    traffic, lock, inside = Traffic(), threading.Lock(), threading.local()

    def wrap(name: str, original: Method) -> Method:
        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if not getattr(inside, "call", False):  # one method may be written in terms of another
                leaving = bytes_leaving(name, group.rank(), group.size(), args)
                with lock:
                    traffic.calls[name] = traffic.calls.get(name, 0) + 1
                    if name in COLLECTIVES:
                        traffic.collective_bytes += leaving
                    else:
                        traffic.row_bytes += leaving
            inside.call = True
            try:
                return original(group, *args, **kwargs)
            finally:
                inside.call = False

        return call

    with wrapped(ProcessGroup, COUNTED, wrap):
        yield traffic


def bytes_leaving(name: str, rank: int, size: int, args: tuple[Any, ...]) -> int:
    """Bytes that a call of ProcessGroup's method `name` hands over for other ranks."""
    if name == "alltoall":
        return sum(_bytes(sent) for peer, sent in enumerate(args[1]) if peer != rank)
    if name in SPLITS:  # (output, input, output splits, input splits, ...)
        sent, splits = args[1], args[3]
        whole = _bytes(sent)
        if not splits:
            return whole - whole // size
        rows = sum(splits)
        return whole // rows * (rows - splits[rank]) if rows else 0
    return _bytes(args[1] if name in ("allgather", "_allgather_base", "reduce_scatter") else args[0])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(one) for one in value)
