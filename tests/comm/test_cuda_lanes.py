"""The CUDA lanes without a GPU: the real interpreter on a recording device, and faults planted in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep.comm import lanes
from ds_moe_ep.comm.lanes import CudaLanes
from ds_moe_ep.config import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.layer import ExpertParallel, Links
from ds_moe_ep.schedule import Kind, Schedule
from ds_moe_ep.topology import Torus
from tests.comm.recording_device import RecordingDevice, RecordingTransport


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDevice]:
    recording = RecordingDevice()
    monkeypatch.setattr(lanes, "torch", SimpleNamespace(cuda=recording))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recording.record_stream(tensor, stream))
    yield recording
    monkeypatch.undo()


def run_layer(
    device: RecordingDevice,
    change: Callable[[Schedule], Schedule] = lambda schedule: schedule,
    experts: int = 8,
    template: type = GeluMLP,
    **knobs: object,
) -> list[str]:
    """The faults of one forward and backward pass on CudaLanes."""
    config = MoEConfig(num_experts=experts, ep_size=4, top_k=2, **{"schedule": "peers", **knobs})
    layer = ExpertParallel(8, template(8, 16), config)
    layer.connect(RecordingTransport(device, 4), Torus(2, 2))
    assert layer._links is not None
    layer._links = Links(layer._links.transport, change(layer._links.forward), change(layer._links.backward))
    layer._lanes, layer._device = CudaLanes(torch.device("cpu")), torch.device("cpu")
    x_TD = torch.randn(40, 8, requires_grad=True)
    with device:
        y_TD, loss, _ = layer(x_TD)
        (y_TD.sum() + loss).backward()
    return device.faults


@pytest.mark.parametrize("schedule", ["serial", "chunks", "peers"])
@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("template", [GeluMLP, SwiGLU])
def test_every_edge_between_lanes_is_an_event(
    device: RecordingDevice, schedule: str, experts: int, template: type
) -> None:
    assert run_layer(device, schedule=schedule, experts=experts, template=template) == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_edges_hold_at_every_depth_with_row_cuts(device: RecordingDevice, depth: int) -> None:
    assert run_layer(device, depth=depth, row_cuts=2) == []


def without_waits_of(kind: Kind) -> Callable[[Schedule], Schedule]:
    """Drops what the ops of one kind wait for, past the entry."""

    def change(schedule: Schedule) -> Schedule:
        ops = tuple(dataclasses.replace(op, after=()) if op.kind is kind else op for op in schedule.ops)
        return dataclasses.replace(schedule, ops=ops)

    return change


@pytest.mark.parametrize("kind", [Kind.COMPUTE, Kind.COMBINE])
def test_a_dropped_edge_is_caught(device: RecordingDevice, kind: Kind) -> None:
    assert any("is not ordered behind" in fault for fault in run_layer(device, without_waits_of(kind)))


def test_swapped_ops_are_caught(device: RecordingDevice) -> None:
    def change(schedule: Schedule) -> Schedule:
        ops = list(schedule.ops)
        compute = next(i for i, op in enumerate(ops) if op.kind is Kind.COMPUTE and op.piece == 1)
        ops[compute], ops[compute + 1] = (
            dataclasses.replace(ops[compute + 1], after=()),
            dataclasses.replace(ops[compute], after=(compute,)),
        )
        return dataclasses.replace(schedule, ops=tuple(ops))

    assert any("is not ordered behind" in fault for fault in run_layer(device, change))


def test_a_missing_entry_event_is_caught(device: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes._EventMark, "wait", lambda mark: None)
    assert any("is not ordered behind" in fault for fault in run_layer(device))


def test_a_missing_record_stream_is_caught(device: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    assert any("without record_stream" in fault for fault in run_layer(device))
