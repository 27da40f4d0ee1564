"""The recorder times what runs on each lane, keeps its labels, and costs nothing when it is off."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ds_moe_ep.comm.lanes import HostLanes, Lanes
from ds_moe_ep.comm.recorder import Both, HostRecorder, Off, make_recorder
from ds_moe_ep.moe.tuner import LinkMeter
from ds_moe_ep.schedule import drift
from ds_moe_ep.schedule.drift import LinkDrift, LinkSample
from ds_moe_ep.schedule.spans import Tags, overlap

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


def run_pass(lanes: Lanes, recorder: HostRecorder) -> None:
    """A transfer of 40 ms is issued before 120 ms of compute that does not need it."""
    entry = lanes.entry()
    transfer = recorder.scope("dispatch", "dispatch 0", NEAR)
    compute = recorder.scope("compute", "compute 0", NEAR)
    marks = [
        lanes.issue("dispatch", [entry], lambda: Sleep(0.04), transfer),
        lanes.issue("compute", [entry], lambda: time.sleep(0.12), compute),
    ]
    lanes.leave(marks)


def test_a_transfer_under_compute_is_hidden_and_a_blocking_one_is_not() -> None:
    recorder, lanes = HostRecorder(rank=0), HostLanes()
    run_pass(lanes, recorder)
    assert (overlap(recorder.spans()).hidden_percent or 0) > 80
    run_pass(lanes.blocking(), recorder)
    assert overlap(recorder.spans()).hidden_percent == 0
    assert recorder.spans() == []


def test_spans_carry_the_rank_the_lane_and_the_labels() -> None:
    recorder = HostRecorder(rank=5)
    run_pass(HostLanes(), recorder)
    spans = {span.lane: span for span in recorder.spans()}
    assert set(spans) == {"dispatch", "compute"}
    assert (spans["dispatch"].name, spans["dispatch"].rank, spans["dispatch"].tags) == ("dispatch 0", 5, NEAR)
    assert 40_000 <= spans["dispatch"].stop_us - spans["dispatch"].start_us < 120_000
    assert spans["compute"].stop_us - spans["compute"].start_us >= 120_000


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


class DeviceEvent:
    """An event of a device that has reached `now`: a millisecond between two records."""

    now, recorded, waits = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1

    def record(self) -> None:
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
    monkeypatch.setattr(drift, "SAMPLE_EVERY", 1)
    seen: list[LinkSample] = []
    monkeypatch.setattr(LinkDrift, "see", lambda self, sample: seen.append(sample))
    meter = LinkMeter(0.5)
    recorder = meter.recorder(torch.device("cuda"), 0, num_rows=10)
    for lane in ("dispatch", "compute", "combine"):
        with recorder.scope(lane, lane, Tags("layer", "forward")):
            pass
    meter.is_beyond_bound()
    assert not seen and not DeviceEvent.waits, "the device is at the beginning"
    DeviceEvent.now = DeviceEvent.recorded
    meter.is_beyond_bound()
    assert seen == [LinkSample(pass_us=5000.0, transfer_us=2000.0, num_rows=10)] and not DeviceEvent.waits
