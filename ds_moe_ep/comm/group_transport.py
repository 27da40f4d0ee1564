"""What the transports over process groups share: the small collectives, and waiting with a time limit."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.transport import Message
from ds_moe_ep.errors import EngineError


class GroupTransport:
    """A transport on the lanes of one group; how rows move is the subclass's."""

    def __init__(self, groups: LaneGroups, timeout_s: float) -> None:
        self.rank = groups.rank
        self.size = groups.size
        self._groups = groups
        self._timeout = timedelta(seconds=timeout_s)

    def limit(self, rows: Tensor) -> timedelta | None:
        """How long a wait for `rows` may block the host. None on CUDA, where waiting must order streams and nothing
        else: NCCL would poll under a limit of ours, and its watchdog holds the group's own."""
        return None if rows.is_cuda else self._timeout

    def keep_own(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Copies the rows that stay on this rank."""
        own = ([m for m in messages if m.peer == self.rank] for messages in (sends, receives))
        for sent, received in zip(*own, strict=True):
            received.rows.copy_(sent.rows)

    def exchange_counts(self, counts_PC: Tensor) -> Tensor:
        return self._groups.exchange_counts(counts_PC)

    def sum(self, values: Tensor) -> Tensor:
        return self._groups.sum(values)


def wait_for(work: dist.Work, what: str, timeout: timedelta | None) -> None:
    """Waits for `work`. Raises EngineError, naming `what`, when it fails or takes longer than `timeout`."""
    try:
        if timeout is None:
            work.wait()
        else:
            work.wait(timeout)
    except RuntimeError as error:
        raise EngineError(
            f"{what} failed: {error}; a peer ended, stalled, or sent another size. Look for the first error of "
            "another rank; moe_ep.timeout_s sets the time limit"
        ) from error
