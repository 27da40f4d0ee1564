"""The part of lanes that only NCCL has: grouped messages, options of a communicator, connections made ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Ends = Sequence[tuple[int, int]]  # of each message: the place of its rows, and the rank at the other end


def exchange(
    group: dist.ProcessGroup,
    sent: Sequence[Tensor],
    sends: Ends,
    received: Sequence[Tensor],
    receives: Ends,
    backend: Any = None,
) -> list[dist.Work]:
    """Starts all messages as one NCCL group: one kernel, in which no peer waits for another.

    As `dist.batch_isend_irecv`, without its wrappers around each message and around them all, whose checks cost the
    host three times as much as the messages; and to the group's backend itself, since the group finds it by the
    dispatcher for each message, which costs the host as much again. `backend`: where the caller has it already.
    """
    device = (sent or received)[0].device
    backend = backend or group._get_backend(device)
    send, receive = backend.send, backend.recv
    group._start_coalescing(device)
    try:
        for place, peer in sends:
            send([sent[place]], peer, 0)
        for place, peer in receives:
            receive([received[place]], peer, 0)
    finally:  # a group that stays open would swallow all that this thread asks of NCCL later
        work = group._end_coalescing(device)
    return [work]


def lane_options(timeout: timedelta, max_ctas: int, make: Callable[..., Any] | None = None) -> Any:
    """The options of a lane's communicator: a stream before compute's in the queue, few thread blocks if so wanted.

    A transfer that waits for multiprocessors behind a matrix product hides nothing; one that takes many of them slows
    the product that hides it. `max_ctas` 0 leaves their number to NCCL. `make` stands for ProcessGroupNCCL.Options.
    """
    options = (make or dist.ProcessGroupNCCL.Options)(is_high_priority_stream=True)
    options._timeout = timeout
    if max_ctas:
        options.config.max_ctas = max_ctas
    return options


def connect_pairs(group: dist.ProcessGroup, rank: int, size: int, device: torch.device) -> None:
    """Makes the connections of this rank with every other one, which NCCL else makes in the first pass. Collective.

    Behind a sum: NCCL wants every rank in a group's first call. A barrier would be one, and choose a device by itself.
    """
    group.allreduce([torch.zeros(1, device=device)]).wait()
    others = [(peer, peer) for peer in range(size) if peer != rank]
    sent, received = torch.zeros(2, size, 1, device=device)
    works = exchange(group, sent.unbind(), others, received.unbind(), others)
    for work in works:
        work.wait()
