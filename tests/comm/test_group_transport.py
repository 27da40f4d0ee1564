"""Waiting: with a limit on the host, without one on CUDA, where a limit would make NCCL poll."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_moe_ep.comm.group_transport import GroupTransport, wait_for
from ds_moe_ep.errors import EngineError


class FakeWork:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error

    def wait(self, *limit: Any) -> None:
        self.calls.append(limit)
        if self.error:
            raise self.error


def test_rows_on_cuda_are_waited_for_without_a_limit() -> None:
    transport = GroupTransport(SimpleNamespace(rank=0, size=2), timeout_s=5)  # type: ignore[arg-type]
    assert transport.limit(torch.zeros(1)) == timedelta(seconds=5)
    assert transport.limit(SimpleNamespace(is_cuda=True)) is None  # type: ignore[arg-type]
    on_host, on_cuda = FakeWork(), FakeWork()
    wait_for(on_host, "rows", timedelta(seconds=5))  # type: ignore[arg-type]
    wait_for(on_cuda, "rows", None)  # type: ignore[arg-type]
    assert on_host.calls == [(timedelta(seconds=5),)] and on_cuda.calls == [()]


def test_a_failed_wait_names_what_failed_and_the_way_out() -> None:
    with pytest.raises(EngineError, match=r"dispatch of rank 3 failed: reset by peer.*moe_ep\.timeout_s"):
        wait_for(FakeWork(RuntimeError("reset by peer")), "dispatch of rank 3", None)  # type: ignore[arg-type]
