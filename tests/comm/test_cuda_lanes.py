"""The CUDA lanes without a GPU: the real interpreter on a recording device, and faults planted in it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.comm import host_copies, lanes
from ds_moe_ep.comm.lanes import CudaLanes, Event
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe import executor as overlap
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.rows import buffers
from ds_moe_ep.schedule.build import OpKind, Schedule, backward_schedule, forward_schedule
from tests.comm.recorded_layer import TORUS, Change, has, run_layer
from tests.comm.recording_device import HOST_METHODS, RecordingDevice, RecordingTransport, RecordingWork


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDevice]:
    recording = RecordingDevice()

    def run(*args: Any) -> None:
        with recording.schedule():
            real_run(*args)

    def watched(method: str) -> Callable[[Tensor], Any]:
        real = getattr(Tensor, method)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not recording.is_pinned(tensor):
                recording.host_waits(method)
            return real(tensor, *args, **kwargs)

        return call

    real_run = overlap.run
    monkeypatch.setattr(overlap, "run", run)
    monkeypatch.setattr(lanes, "torch", SimpleNamespace(cuda=recording))
    of_torch = {"frombuffer": torch.frombuffer, "empty": torch.empty, "int64": torch.int64}
    monkeypatch.setattr(host_copies, "torch", SimpleNamespace(cuda=recording, **of_torch))
    monkeypatch.setattr(host_copies, "runs_beside_the_host", lambda device: True)
    monkeypatch.setattr(host_copies, "empty_pinned", recording.empty_pinned)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: recording.record_stream(tensor, stream))
    for method in HOST_METHODS:
        monkeypatch.setattr(Tensor, method, watched(method))
    real_tensor = torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None:
            recording.host_waits("torch.tensor on a device")
        return real_tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    lanes.lane_stream.cache_clear()
    yield recording
    lanes.lane_stream.cache_clear()
    monkeypatch.undo()


@pytest.mark.parametrize("schedule", ["serial", "chunks", "peers"])
@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("template", [GeluMLP, SwiGLU])
def test_every_edge_between_lanes_is_an_event(
    device: RecordingDevice, schedule: str, experts: int, template: type[nn.Module]
) -> None:
    assert run_layer(device, schedule=schedule, experts=experts, template=template) == []


@pytest.mark.parametrize("schedule", ["serial", "chunks", "peers"])
@pytest.mark.parametrize("template", [GeluMLP, SwiGLU])
def test_a_shared_expert_needs_no_further_edge(
    device: RecordingDevice, schedule: str, template: type[nn.Module]
) -> None:
    assert run_layer(device, schedule=schedule, template=template, has_shared=True, depth=1) == []


@pytest.mark.parametrize("schedule", ["serial", "chunks", "peers"])
@pytest.mark.parametrize("template", [GeluMLP, SwiGLU])
def test_rows_that_move_by_index_need_no_further_edge_and_no_wait_of_the_host(
    device: RecordingDevice, monkeypatch: pytest.MonkeyPatch, schedule: str, template: type[nn.Module]
) -> None:
    monkeypatch.setattr(buffers, "moves_by_index", lambda device: True)
    assert run_layer(device, schedule=schedule, experts=16, template=template, depth=1) == []
    assert device.host_waited == ["synchronize of an event"]
    assert "aten::index_copy_" in device.launched


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_edges_hold_at_every_depth_with_row_cuts(device: RecordingDevice, depth: int) -> None:
    assert run_layer(device, depth=depth, row_cuts=2) == []


@pytest.mark.parametrize("schedule", ["chunks", "peers"])
@pytest.mark.parametrize("experts", [4, 8])
def test_no_edge_is_one_too_many(device: RecordingDevice, schedule: str, experts: int) -> None:
    """Products run beside every transfer but a pass's first dispatch and the last combine of the forward pass."""
    run_layer(device, schedule=schedule, experts=experts, depth=1)
    bare = [
        index
        for index, transfer in enumerate(device.transfers)
        if not any(transfer.is_beside(product) for product in device.products)
    ]
    half = len(device.transfers) // 2
    assert bare == [0, half - 1, half]
    assert [device.transfers[index].stream for index in bare] == ["wire dispatch", "wire combine", "wire dispatch"]


def test_nothing_runs_beside_a_transfer_at_depth_zero(device: RecordingDevice) -> None:
    run_layer(device, depth=0)
    assert len(device.transfers) == 12
    assert not any(transfer.is_beside(product) for transfer in device.transfers for product in device.products)


def without_waits_of(*names: str, in_pass: str = "both") -> Change:
    """Drops what ops wait for, past the entry."""

    def change(schedule: Schedule) -> Schedule:
        is_backward = any(op.kind is OpKind.WEIGHTS for op in schedule.ops)
        if in_pass not in ("both", "backward" if is_backward else "forward"):
            return schedule
        ops = [dataclasses.replace(op, after=()) if str(op) in names else op for op in schedule.ops]
        assert tuple(ops) != schedule.ops
        return dataclasses.replace(schedule, ops=tuple(ops))

    return change


EDGES = [
    (phase, str(op))
    for phase, make in (("forward", forward_schedule), ("backward", backward_schedule))
    for op in make(MoEConfig(schedule="peers"), TORUS).ops
    if op.after and op.kind is not OpKind.WEIGHTS
]


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize(("phase", "name"), EDGES)
def test_each_dropped_edge_is_caught(device: RecordingDevice, phase: str, name: str, experts: int) -> None:
    faults = run_layer(device, without_waits_of(name, in_pass=phase), experts=experts)
    assert has(faults, "is not ordered behind")


def test_edges_of_weight_gradients_repeat_the_order_of_their_lane(device: RecordingDevice) -> None:
    def change(schedule: Schedule) -> Schedule:
        ops = [dataclasses.replace(op, after=()) if op.kind is OpKind.WEIGHTS else op for op in schedule.ops]
        return dataclasses.replace(schedule, ops=tuple(ops))

    assert run_layer(device, change) == []


def swapped(first: str, second: str) -> Change:
    """Issues two ops in each other's place, the first one with no wait; where a pass has both."""

    def change(schedule: Schedule) -> Schedule:
        names = [str(op) for op in schedule.ops]
        if not {first, second} <= {*names}:
            return schedule
        here, there = names.index(first), names.index(second)
        ops = list(schedule.ops)
        ops[here] = dataclasses.replace(ops[there], after=())
        ops[there] = dataclasses.replace(schedule.ops[here], after=())
        return dataclasses.replace(schedule, ops=tuple(ops))

    return change


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ("dispatch 1", "compute 1", "is not ordered behind"),
        ("compute 1", "combine 1", "is not ordered behind"),
        ("compute 2", "weights 0", "on compute reads what nothing has written"),
    ],
)
def test_swapped_ops_are_caught(device: RecordingDevice, first: str, second: str, fault: str) -> None:
    assert has(run_layer(device, swapped(first, second), weight_blocks=4), fault)


class NoEntry(CudaLanes):
    def entry(self) -> Event:
        super().entry()
        return lanes._StreamEvent("compute", -1, None)  # older than all that a lane has seen


class NoLeave(CudaLanes):
    def leave(self, events: Sequence[Event]) -> None:
        return None


class LeavesEarly(CudaLanes):
    def leave(self, events: Sequence[Event]) -> None:
        super().leave([event for event in events if event.lane != "combine"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("make_lanes", [NoEntry, NoLeave, LeavesEarly])
@pytest.mark.parametrize("schedule", ["serial", "peers"])
def test_a_missing_entry_or_leave_is_caught(
    device: RecordingDevice, make_lanes: type[CudaLanes], schedule: str
) -> None:
    assert has(run_layer(device, make_lanes=make_lanes, schedule=schedule), "is not ordered behind")


def test_a_communicator_that_is_not_waited_for_is_caught(
    device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_finish", lambda work: work())
    faults = run_layer(device)
    assert has(faults, "is not ordered behind") and has(faults, "a transfer is not waited for")


@pytest.mark.parametrize("make_lanes", [NoLeave, LeavesEarly])
def test_memory_that_is_freed_while_a_lane_may_use_it_is_caught(
    device: RecordingDevice, make_lanes: type[CudaLanes]
) -> None:
    assert has(run_layer(device, make_lanes=make_lanes), "memory of compute is freed while")


def reads(rows: Tensor) -> None:
    rows.sum()


@pytest.mark.parametrize("lane", ["dispatch", "combine"])
@pytest.mark.parametrize("ends", ["", "leave", "abandon"])
def test_the_end_of_a_pass_or_record_stream_covers_what_a_lane_uses(
    device: RecordingDevice, lane: str, ends: str
) -> None:
    with device:
        pass_lanes = CudaLanes(torch.device("cpu"))
        rows = torch.ones(4)
        event = pass_lanes.issue(lane, [pass_lanes.entry()], partial(reads, rows), nullcontext())
        if ends == "leave":
            pass_lanes.leave([event])
        if ends == "abandon":
            pass_lanes.abandon([rows])
        del rows
        gc.collect()
        device.check_freed()
    assert has(device.faults, "memory of compute is freed while") == (not ends)
    assert device.num_given == (2 if ends == "abandon" else 0)


class FailingTransport(RecordingTransport):
    def start(self, lane: str, *transfer: Any) -> RecordingWork:
        if lane == "combine":
            raise RuntimeError("the link is gone")
        return super().start(lane, *transfer)


def test_a_pass_that_fails_gives_its_rows_to_the_record_of_each_lane(device: RecordingDevice) -> None:
    with pytest.raises(RuntimeError, match="the link is gone"):
        run_layer(device, make_transport=FailingTransport)
    device.check_freed()
    assert not has(device.faults, "freed")
    assert device.num_given == 2 * 6


@pytest.mark.parametrize("schedule", ["serial", "chunks", "peers"])
@pytest.mark.parametrize("experts", [4, 8])
def test_the_host_waits_once_in_a_forward_pass_and_never_in_a_backward_one(
    device: RecordingDevice, schedule: str, experts: int
) -> None:
    assert run_layer(device, schedule=schedule, experts=experts) == []
    assert device.host_waited == ["synchronize of an event"]
    assert device.forward_waits == 1


def test_what_needs_no_sizes_is_launched_before_the_host_waits_for_them(
    device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[str] = []
    monkeypatch.setattr(device, "host_waits", lambda what: before.extend([] if before else device.launched))
    run_layer(device)
    assert before.count("aten::index_select") == 1, "the rows in send order"
    assert "aten::scatter_" in before, "the map of rows back"


@pytest.mark.parametrize(
    "ask", [lambda x: x.new_tensor([1]), lambda x: torch.tensor([1], device=x.device), lambda x: x.tolist()]
)
def test_a_copy_of_pageable_memory_counts_as_a_wait(device: RecordingDevice, ask: Callable[[Tensor], Any]) -> None:
    ask(torch.zeros(2))
    assert len(device.host_waited) == 1


def test_a_pass_of_peers_on_four_nodes_of_four_records_few_events_and_gives_no_memory_away(
    device: RecordingDevice,
) -> None:
    """By hand, a pass of five pieces: the entry, five dispatches, five computes and the last combine are recorded.

    Waited for: the entry by either lane that starts behind it (here dispatch), each dispatch by its compute, each
    compute by its combine, the last combine by the caller. Backward the last op of compute is awaited too.
    """
    assert run_layer(device, experts=16, torus=Torus(4, 4), depth=1) == []
    assert (device.num_events - 1, device.num_stream_waits, device.num_given) == (2 * 12 + 1, 2 * 12, 0)


class SynchronizesTheDevice(CudaLanes):
    def leave(self, events: Sequence[Event]) -> None:
        super().leave(events)
        lanes.torch.cuda.synchronize()


class SynchronizesAStream(CudaLanes):
    def leave(self, events: Sequence[Event]) -> None:
        self._own["combine"].synchronize()
        super().leave(events)


class SynchronizesEvents(CudaLanes):
    def leave(self, events: Sequence[Event]) -> None:
        super().leave(events)
        for event in events:
            if event.recorded is not None:  # type: ignore[attr-defined]
                event.recorded.synchronize()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make_lanes", "fault"),
    [
        (SynchronizesTheDevice, "synchronize of the whole device"),
        (SynchronizesAStream, "synchronize of stream lane 2 makes the host wait"),
        (SynchronizesEvents, "synchronize of an event makes the host wait"),
    ],
)
def test_a_synchronize_is_caught(device: RecordingDevice, make_lanes: type[CudaLanes], fault: str) -> None:
    assert has(run_layer(device, make_lanes=make_lanes), fault)


@pytest.mark.parametrize(
    ("ask", "fault"),
    [
        (Tensor.item, "aten::_local_scalar_dense"),
        (Tensor.__bool__, "aten::_local_scalar_dense"),
        (Tensor.nonzero, "aten::nonzero"),
        (lambda tensor: tensor.tolist(), "tolist"),
        (lambda tensor: tensor.cpu(), "cpu"),
        (lambda tensor: tensor.detach().numpy(), "numpy"),
    ],
)
def test_a_question_to_the_device_inside_the_schedule_is_caught(
    device: RecordingDevice, ask: Callable[[Tensor], Any], fault: str
) -> None:
    class Asks(RecordingTransport):
        def start(self, *transfer: Any) -> RecordingWork:
            ask(torch.zeros(1))
            return super().start(*transfer)

    assert has(run_layer(device, make_transport=Asks), f"{fault} makes the host wait inside the schedule")


def test_a_transfer_that_is_waited_for_twice_is_caught(device: RecordingDevice) -> None:
    class Twice(RecordingTransport):
        def start(self, *transfer: Any) -> RecordingWork:
            work = super().start(*transfer)
            work.wait()
            return work

    assert has(run_layer(device, make_transport=Twice), "waited for twice")


class OfAnyDevice(CudaLanes):
    def entry(self) -> Event:
        entry = super().entry()
        lanes.torch.cuda.current_stream()
        return entry


@pytest.mark.parametrize("make_lanes", [CudaLanes, OfAnyDevice])
def test_streams_and_events_are_those_of_the_layers_device_whichever_is_current(
    device: RecordingDevice, make_lanes: type[CudaLanes]
) -> None:
    """A process whose current device is another than the layer's would else order nothing, and read early."""
    run_layer(device, make_lanes=make_lanes)
    assert len(device.asked_of) >= 3, "the counts, the pass and the pass back"
    assert (None in device.asked_of) == (make_lanes is OfAnyDevice)
