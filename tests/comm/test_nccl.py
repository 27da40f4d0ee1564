"""Calls of lanes to NCCL, on a stand-in that writes them down: there is no NCCL without a GPU."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.comm import nccl


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


def test_every_pair_is_connected_by_a_message_each_way() -> None:
    group: Any = Written()
    group._end_coalescing = lambda device: SimpleNamespace(wait=lambda: group.calls.append(("waited for",)))
    nccl.connect_pairs(group, 1, 3, torch.device("cpu"))
    messages = [("send", [0.0], 0), ("send", [0.0], 2), ("recv", [0.0], 0), ("recv", [0.0], 2)]
    assert group.calls == [("start", "cpu"), *messages, ("waited for",)]


def test_a_lane_gets_a_priority_stream_a_time_limit_and_as_many_thread_blocks_as_asked_for() -> None:
    def make(**given: Any) -> Any:
        return SimpleNamespace(config=SimpleNamespace(max_ctas="NCCL's own"), **given)

    for asked, expected in ((0, "NCCL's own"), (8, 8)):
        options = nccl.lane_options(timedelta(seconds=5), asked, make)
        assert (options.is_high_priority_stream, options._timeout) == (True, timedelta(seconds=5))
        assert options.config.max_ctas == expected
