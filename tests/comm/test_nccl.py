"""Calls of lanes to NCCL, on a stand-in that writes them down: there is no NCCL without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm import nccl
from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.pairwise import Pairwise
from ds_moe_ep.comm.transport import CutMessages, Message, Views
from ds_moe_ep.errors import PeerError
from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.watch import Unwatched
from ds_moe_ep.schedule.spans import Tags


class Written:
    """Calls of a process group of NCCL's, and of its backend, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def _get_backend(self, device: torch.device) -> Written:
        return self

    def _start_coalescing(self, device: torch.device) -> None:
        self.calls.append(("start", device.type))

    def _end_coalescing(self, device: torch.device) -> str:
        self.calls.append(("end", device.type))
        return "work"

    def allreduce(self, tensors: list[Tensor]) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: self.calls.append(("sum", tensors[0].device.type)))

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        self.calls.append(("send", tensors[0].tolist(), peer))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        self.calls.append(("recv", tensors[0].tolist(), peer))


def test_all_messages_of_a_transfer_are_one_group_and_one_call_each() -> None:
    group: Any = Written()
    rows = torch.arange(4)
    works = nccl.exchange(group, rows.split(2), [(0, 1), (1, 2)], [rows[:1], rows[1:]], [(0, 3)])
    sent = [("send", [0, 1], 1), ("send", [2, 3], 2), ("recv", [0], 3)]
    assert group.calls == [("start", "cpu"), *sent, ("end", "cpu")]
    assert works == ["work"]


class Aborted(Written):
    """A communicator that was aborted: messages that come raise."""

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        raise RuntimeError("NCCL communicator was aborted on rank 0.")


def test_a_group_of_messages_is_ended_where_one_of_them_raises() -> None:
    group: Any = Aborted()
    rows = torch.arange(4)
    with pytest.raises(RuntimeError, match="was aborted"):
        nccl.exchange(group, [rows], [(0, 1)], [rows], [(0, 1)])
    assert [call[0] for call in group.calls] == ["start", "send", "end"]


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_transfer_on_a_communicator_that_was_aborted_names_place_and_peer(
    monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    group: Any = Aborted()
    guard = AbortGuard(0, (4, 7), [])
    transport = Pairwise(LaneGroups(0, (4, 7), {"dispatch": group}, guard, Unwatched()), 60.0)
    rows = torch.ones(2, 3)
    messages: Sequence[Message] = [Message(1, rows, 0, 2)]
    if is_cut:
        messages = CutMessages(rows, [(1, (0, 2))], Views(rows, [2]), [], [(0, 1)])
    with pytest.raises(PeerError, match=r"^layer_3.*rank 7 did not answer rank 4: NCCL communicator was aborted"):
        transport.start("dispatch", messages, messages, Tags("layer_3", "forward", "near"))
    assert guard.failure is not None and "layer_3" in guard.failure


def test_every_pair_is_connected_by_a_message_each_way_behind_a_call_of_all_ranks() -> None:
    group: Any = Written()
    group._end_coalescing = lambda device: SimpleNamespace(wait=lambda: group.calls.append(("waited for",)))
    nccl.connect_pairs(group, 1, 3, torch.device("cpu"))
    messages = [("send", [0.0], 0), ("send", [0.0], 2), ("recv", [0.0], 0), ("recv", [0.0], 2)]
    assert group.calls == [("sum", "cpu"), ("start", "cpu"), *messages, ("waited for",)]


def test_a_lane_gets_a_priority_stream_a_time_limit_and_as_many_thread_blocks_as_asked_for() -> None:
    def make(**given: Any) -> Any:
        return SimpleNamespace(config=SimpleNamespace(max_ctas="NCCL's own"), **given)

    for asked, expected in ((0, "NCCL's own"), (8, 8)):
        options = nccl.lane_options(timedelta(seconds=5), asked, make)
        assert (options.is_high_priority_stream, options._timeout) == (True, timedelta(seconds=5))
        assert options.config.max_ctas == expected


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL")
def test_the_real_options_and_calls_of_nccl_are_as_the_stand_ins_have_them() -> None:
    """A build for CUDA has them without a GPU."""
    asked, left_alone = (nccl.lane_options(timedelta(seconds=5), max_ctas) for max_ctas in (8, 0))
    assert (asked.is_high_priority_stream, asked._timeout, asked.config.max_ctas) == (True, timedelta(seconds=5), 8)
    assert left_alone.config.max_ctas != 8
    backend, group = dist.ProcessGroupNCCL, dist.ProcessGroup
    assert all(hasattr(backend, name) for name in ("send", "recv", "_group_start", "_group_end"))
    names = ("_get_backend", "_start_coalescing", "_end_coalescing", "allreduce", "alltoall_base", "abort")
    assert all(hasattr(group, name) for name in names)
