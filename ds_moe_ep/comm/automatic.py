"""Rows move by whichever exchange is cheaper for a transfer: the transport "auto"."""

from __future__ import annotations

from collections.abc import Sequence

from ds_moe_ep.comm.collective import Collective
from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.pairwise import Pairwise
from ds_moe_ep.comm.transport import Message, Transfer
from ds_moe_ep.schedule.spans import NO_TAGS, Tags


class Automatic(Pairwise):
    """All-to-all for a transfer between all ranks on the host, where each message costs the processor; else pairwise.

    A schedule has the same transfers on every rank, so that all of them decide alike.
    """

    def __init__(self, groups: LaneGroups, timeout_s: float) -> None:
        super().__init__(groups, timeout_s)
        self._collective = Collective(groups, timeout_s)

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        if len(sends) == self.size and not sends[0].buffer_RD.is_cuda:
            return self._collective.start(lane, sends, receives, tags)
        return super().start(lane, sends, receives, tags)
