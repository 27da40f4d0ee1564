"""The recorder times what runs on each lane, keeps its labels, and costs nothing when it is off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from ds_moe_ep.comm.lanes import HostLanes, Lanes
from ds_moe_ep.comm.recorder import Both, HostRecorder, Off, make_recorder
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.tuner import LinkMeter
from ds_moe_ep.schedule import drift
from ds_moe_ep.schedule.drift import LinkDrift, LinkSample
from ds_moe_ep.schedule.spans import Span, Tags, overlap

NEAR = Tags("moe", "forward", "near")


class Sleep:
    """A transfer that takes a while on its own."""

    def __init__(self, seconds: float) -> None:
        self.end_s = time.perf_counter() + seconds

    def wait(self) -> None:
        time.sleep(max(0.0, self.end_s - time.perf_counter()))


class Broken:
    def wait(self) -> None:
        raise ConnectionError("peer 3 has gone")


def run_pass(lanes: Lanes, recorder: HostRecorder, unit_s: float = 0.04) -> None:
    """A transfer of one unit is issued before three units of compute that does not need it."""
    entry = lanes.entry()
    transfer = recorder.scope("dispatch", "dispatch 0", NEAR)
    compute = recorder.scope("compute", "compute 0", NEAR)
    marks = [
        lanes.issue("dispatch", [entry], lambda: Sleep(unit_s), transfer),
        lanes.issue("compute", [entry], lambda: time.sleep(3 * unit_s), compute),
    ]
    lanes.leave(marks)


def spans_of_a_pass(is_as_expected: Callable[[dict[str, Span], float], bool], rank: int = 0) -> dict[str, Span]:
    """Spans by lane of a pass that is as expected, in longer and longer units: a busy machine wakes threads late."""
    for unit_s in (0.04, 0.08, 0.16, 0.32, 0.64, 1.28):
        recorder = HostRecorder(rank)
        run_pass(HostLanes(), recorder, unit_s)
        spans = {span.lane: span for span in recorder.spans()}
        if is_as_expected(spans, 1e6 * unit_s):
            return spans
    raise AssertionError(f"no pass is as expected; the last: {spans}")


def test_a_transfer_under_compute_is_hidden_and_a_blocking_one_is_not() -> None:
    spans_of_a_pass(lambda spans, _: (overlap(list(spans.values())).hidden_percent or 0) > 80)
    recorder = HostRecorder(rank=0)
    run_pass(HostLanes().blocking(), recorder)
    assert overlap(recorder.spans()).hidden_percent == 0
    assert recorder.spans() == []


def test_spans_carry_the_rank_the_lane_and_the_labels() -> None:
    def last_as_long_as_they_took(spans: dict[str, Span], unit_us: float) -> bool:
        transfer_us, compute_us = (spans[lane].stop_us - spans[lane].start_us for lane in ("dispatch", "compute"))
        assert unit_us <= transfer_us and 3 * unit_us <= compute_us
        return transfer_us < 3 * unit_us

    spans = spans_of_a_pass(last_as_long_as_they_took, rank=5)
    assert set(spans) == {"dispatch", "compute"}
    assert (spans["dispatch"].name, spans["dispatch"].rank, spans["dispatch"].tags) == ("dispatch 0", 5, NEAR)


def test_lanes_of_several_threads_record_every_span() -> None:
    recorder = HostRecorder(rank=0)

    def record(lane: str) -> None:
        for index in range(500):
            with recorder.scope(lane, f"{lane} {index}", NEAR):
                pass

    threads = [threading.Thread(target=record, args=(lane,)) for lane in ("dispatch", "combine", "compute")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({span.name for span in recorder.spans()}) == 1500


def test_the_error_of_a_recorded_transfer_reaches_the_waiter() -> None:
    lanes, recorder = HostLanes(), HostRecorder(rank=0)
    mark = lanes.issue("combine", [], Broken, recorder.scope("combine", "combine 2", NEAR))
    with pytest.raises(ConnectionError, match="peer 3"):
        mark.wait()


def test_off_records_nothing_and_makes_no_scope_of_its_own() -> None:
    off = Off()
    scope = off.scope("dispatch", "dispatch 0", NEAR)
    with scope:
        pass
    assert off.spans() == [] and off.scope("compute", "compute 1", Tags()) is scope


def test_two_recorders_are_one_where_one_of_them_is_off() -> None:
    off, one, other = Off(), HostRecorder(0), HostRecorder(1)
    assert Both.of(one, off) is one and Both.of(off, one) is one
    with Both.of(one, other).scope("compute", "both", NEAR):
        pass
    assert [[(span.rank, span.name) for span in each.spans()] for each in (one, other)] == [
        [(0, "both")],
        [(1, "both")],
    ]


def test_the_host_is_timed_by_its_own_clock() -> None:
    assert isinstance(make_recorder(torch.device("cpu"), 3), HostRecorder)


DEVICE = torch.device("cuda", 1)


class DeviceEvent:
    """An event of a device that has reached `now`: a millisecond between two records."""

    now, recorded, waits = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1

    def record(self, stream: torch.device) -> None:
        assert stream == DEVICE, "a stream of the layer's device, which need not be the current one"
        self.at = DeviceEvent.recorded
        DeviceEvent.recorded += 1

    def query(self) -> bool:
        return self.at < DeviceEvent.now

    def synchronize(self) -> None:
        DeviceEvent.waits += not self.query()

    def elapsed_time(self, other: DeviceEvent) -> float:
        return float(other.at - self.at)


def test_on_cuda_the_tuner_reads_a_recorded_pass_when_the_device_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(drift, "SAMPLE_EVERY", 1)
    seen: list[LinkSample] = []
    monkeypatch.setattr(LinkDrift, "see", lambda self, sample: seen.append(sample))
    meter = LinkMeter(0.5)
    none = torch.empty(0, dtype=torch.int64)
    plan = DispatchPlan(RowMaps(none, none.view(0, 1)), ((5,), (10,)), ((5,), (10,)))  # ten rows for the other rank
    recorder = meter.recorder(DEVICE, 0, plan)
    for lane in ("dispatch", "compute", "combine"):
        with recorder.scope(lane, lane, Tags("layer", "forward")):
            pass
    meter.is_beyond_bound()
    assert not seen and not DeviceEvent.waits, "the device is at the beginning"
    DeviceEvent.now = DeviceEvent.recorded
    meter.is_beyond_bound()
    assert seen == [LinkSample(pass_us=5000.0, transfer_us=2000.0, num_rows=10)] and not DeviceEvent.waits
