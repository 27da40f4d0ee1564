"""How the use of lanes ends: NCCL's communicators, which no connection wakes, are aborted, all in one NCCL group."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch

from ds_moe_ep.health import abort as guard
from ds_moe_ep.health.abort import CLOSING_TAG, AbortGuard


class FakeBackend:
    """The part of a fake group that NCCL moves."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def _group_start(self) -> None:
        self._calls.append("group start")

    def _group_end(self) -> None:
        self._calls.append("group end")


class FakeGroup:
    """A process group over NCCL, or over gloo, which names itself the backend of a GPU too, as torch's does.

    An abort returns once it may, if it is told when.
    """

    def __init__(
        self, name: str, calls: list[str], backend: Any = None, may_return: threading.Event | None = None
    ) -> None:
        self._name, self._calls, self._backend, self._may_return = name, calls, backend, may_return

    def _get_backend(self, device: torch.device) -> Any:
        assert device.type == "cuda"
        return self._backend

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeGroup:
        if self._backend is not self and self._backend is not None:
            raise RuntimeError("No backend type associated with device type cpu")
        assert tag == CLOSING_TAG
        return self

    def wait(self, limit: timedelta) -> None:
        self._calls.append(f"close {self._name}")
        raise RuntimeError("Timed out waiting")

    def abort(self) -> None:
        if self._may_return is not None:
            self._may_return.wait()
        self._calls.append(f"abort {self._name}")
        if self._name == "dispatch":
            raise RuntimeError("this communicator never began")


def ended(groups: list[FakeGroup]) -> AbortGuard:
    lanes = AbortGuard(0, (0, 1), groups)  # type: ignore[arg-type]
    lanes.end("rank 1 is gone")
    lanes.end("an echo")
    return lanes


def test_nccls_communicators_are_aborted_once_together_and_one_that_fails_keeps_no_other() -> None:
    calls: list[str] = []
    backend = FakeBackend(calls)
    lanes = ended([FakeGroup(name, calls, backend) for name in ("dispatch", "combine", "control")])
    assert calls == ["group start", "abort dispatch", "abort combine", "abort control", "group end"]
    assert lanes.failure == "rank 1 is gone"


def test_gloos_connections_are_closed_and_nothing_is_aborted() -> None:
    calls: list[str] = []
    groups = [FakeGroup(name, calls) for name in ("dispatch", "combine")]
    for group in groups:
        group._backend = group  # as gloo's groups of torch, which have no NCCL group to start
    ended(groups)
    assert calls == ["close dispatch", "close combine"]


def test_an_abort_that_does_not_return_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LONGEST_ABORT_S", 0.2)
    calls, may_return = list[str](), threading.Event()
    lanes = ended([FakeGroup("combine", calls, FakeBackend(calls), may_return)])  # it would wait for the event below
    assert lanes.failure == "rank 1 is gone" and "abort combine" not in calls
    may_return.set()
    for thread in threading.enumerate():
        if thread.name == "ds_moe_ep abort":
            thread.join()
    assert calls == ["group start", "abort combine", "group end"]
