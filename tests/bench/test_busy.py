"""The busy fraction: counters of seconds by hand, the processor for real, NVML's calls by a stand-in of its module."""

from __future__ import annotations

import math
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_moe_ep.bench.meters import busy
from ds_moe_ep.bench.meters.busy import busy_meter, elapsing_meter, percent_of
from ds_moe_ep.errors import EngineError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
UUIDS = {0: "aaaa-0000", 1: "bbbb-1111"}  # torch's numbers, after CUDA_VISIBLE_DEVICES


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """pynvml with one utilization after the other for the device that torch calls cuda:1."""

    NVMLError = NVMLError

    def __init__(self, answers: list[int], fails: str = "") -> None:
        self.answers, self.fails = answers, fails
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        self._called("init")

    def nvmlShutdown(self) -> None:
        self._called("shutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._called("handle")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._called("rates")
        assert handle == "GPU-bbbb-1111"
        return SimpleNamespace(gpu=self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise NVMLError("Not Supported")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(nvml: FakeNvml) -> FakeNvml:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=UUIDS[d.index]))
        return nvml

    return install


def test_a_sleeping_block_is_idle_and_a_working_one_is_busy() -> None:
    with busy_meter(CPU) as asleep:
        time.sleep(0.2)
    with busy_meter(CPU) as awake:
        until = time.process_time() + 0.1  # processor time: other processes may slow it, and do not count
        while time.process_time() < until:
            pass
    assert asleep.percent < 20
    assert awake.percent > asleep.percent and awake.percent <= 101


def test_a_meter_is_not_a_number_before_its_block_ends() -> None:
    with busy_meter(CPU) as meter:
        assert math.isnan(meter.percent)
    assert not math.isnan(meter.percent)


def test_an_emulated_device_is_busy_for_what_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, now_s = [5.0], [100.0]
    monkeypatch.setattr(busy, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    with elapsing_meter(lambda: waited[0]) as meter:
        now_s[0] += 0.5
        waited[0] += 0.25
    assert meter.percent == pytest.approx(50)
    with elapsing_meter(lambda: waited[0]) as idle:
        now_s[0] += 0.5
    assert idle.percent == 0


def test_the_share_of_no_time_is_0() -> None:
    assert percent_of(0.5, 2.0) == 25 and percent_of(0.0, 0.0) == 0


def test_a_gpu_is_found_by_uuid_and_its_samples_are_averaged(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    monkeypatch.setattr(busy, "SAMPLE_S", 0.01)
    nvml = driver(FakeNvml([100, 50, 0, 50]))
    with busy_meter(CUDA) as meter:
        while nvml.calls.count("rates") < 4:
            time.sleep(0.005)
    assert meter.percent == pytest.approx(50)
    assert nvml.calls[0] == "init" and nvml.calls[-1] == "shutdown"


def test_a_block_shorter_than_a_period_has_one_sample(driver: Any) -> None:
    nvml = driver(FakeNvml([70]))
    with busy_meter(CUDA) as meter:
        pass
    assert meter.percent == 70 and nvml.calls.count("rates") == 1


@pytest.mark.parametrize("fails", ["init", "handle", "rates"])
def test_a_driver_without_utilization_is_an_error_that_says_so(driver: Any, fails: str) -> None:
    nvml = driver(FakeNvml([70], fails))
    with pytest.raises(EngineError, match=r"cuda:1.*Not Supported.*MIG"), busy_meter(CUDA):
        pass
    assert fails == "init" or nvml.calls[-1] == "shutdown"


def test_an_error_of_the_block_comes_through_and_the_thread_ends(driver: Any) -> None:
    nvml = driver(FakeNvml([70]))
    with pytest.raises(ZeroDivisionError), busy_meter(CUDA):
        1 / 0  # noqa: B018
    assert nvml.calls[-1] == "shutdown"


def test_a_missing_library_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EngineError, match="pip install nvidia-ml-py"), busy_meter(CUDA):
        pass
