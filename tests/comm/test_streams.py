"""Streams and events of CUDA without a GPU: whose they are, how many there are, and where there must be none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep.comm import host_copies, lanes, recorder
from ds_moe_ep.comm.host_copies import CopyToHost
from ds_moe_ep.comm.lanes import CudaLanes
from ds_moe_ep.comm.transport import LANES
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import NO_TAGS
from tests.comm.recording_device import RecordingDevice


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams that are made on no device; the real ones of other tests are kept apart."""
    lanes.lane_stream.cache_clear()
    monkeypatch.setattr(lanes, "torch", SimpleNamespace(cuda=RecordingDevice()))
    yield
    lanes.lane_stream.cache_clear()


def test_layers_and_copies_of_them_share_a_stream_per_lane_and_device(streams: None) -> None:
    """torch has 32 streams of a priority and hands them out in turn, to communicators too."""
    first, of_another = CudaLanes(torch.device("cuda:0")), CudaLanes(torch.device("cuda:1"))
    for second in (copy.deepcopy(first), CudaLanes(torch.device("cuda:0"))):
        for lane in (*LANES, "spread"):
            assert second._stream(lane) is first._stream(lane)
        assert second._seen is not first._seen
    assert {*map(id, first._own.values())}.isdisjoint(map(id, of_another._own.values()))
    assert first.blocking() is first


class Asked:
    """What is asked of torch.cuda: of which device the current stream, and which stream an event marks."""

    def __init__(self) -> None:
        self.marked: list[object] = []

    def current_stream(self, device: object = None) -> str:
        return f"stream of {device}"

    def Event(self, enable_timing: bool = False) -> SimpleNamespace:
        return SimpleNamespace(record=lambda stream=None: self.marked.append(stream), synchronize=lambda: None)


def test_a_recorder_marks_the_streams_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(recorder, "torch", SimpleNamespace(cuda=asked))
    with recorder.make_recorder(torch.device("cuda:1"), 0).scope("compute", "compute 0", NO_TAGS):
        pass
    assert asked.marked == ["stream of cuda:1"] * 3, "the origin, the begin and the end"


def test_the_host_waits_for_counts_on_the_stream_that_copies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(host_copies, "torch", SimpleNamespace(cuda=asked))
    monkeypatch.setattr(host_copies, "runs_beside_the_host", lambda device: True)
    monkeypatch.setattr(host_copies, "empty_pinned", torch.empty_like)
    assert CopyToHost(torch.arange(3)).wait() == [0, 1, 2]
    assert asked.marked == ["stream of cpu"], "the tensor's own device, not the current one"


def test_a_layer_inside_of_a_cuda_graphs_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ExpertParallel(8, GeluMLP(8, 16), MoEConfig(num_experts=2))
    cuda, is_inside = torch.device("cuda:0"), [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_inside[0])
    scope = layer.dispatcher.announcing(cuda, True)
    with pytest.raises(EngineError, match="while a CUDA graph is being captured"), scope:
        raise AssertionError("the pass has begun")
    layer(torch.randn(3, 8))  # on the CPU nothing is captured
    is_inside[0] = False
    with layer.dispatcher.announcing(cuda, True):
        pass
