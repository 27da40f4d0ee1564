"""Busy fraction: how much of a block's wall time the device worked, whatever it worked on.

On CUDA it is what nvidia-ml-py calls utilization.gpu: the share of the driver's last sampling period in which a kernel
ran, of any process on the device. A thread asks for it while the block runs, and the mean of the answers is reported. A
block should last a second or more, since the period is up to one second long. On a CPU it is the processor time of this
process, user and system, all threads, over the wall time: 100 is one core. On an emulated device, which computes by
waiting, it is the seconds that were waited. None of the three says how well the work was done: that is the model-flop
utilization.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_moe_ep.errors import EngineError

SAMPLE_S = 0.1


@dataclass
class Busy:
    """Finding of a meter: `percent` is not a number until its block has ended."""

    percent: float = math.nan


def busy_meter(device: torch.device) -> AbstractContextManager[Busy]:
    """A meter of the device for the time of a block. Local.

    Raises EngineError on CUDA where nvidia-ml-py is missing or the driver tells no utilization.
    """
    return _cuda_meter(device) if device.type == "cuda" else elapsing_meter(time.process_time)


@contextmanager
def elapsing_meter(busy_s: Callable[[], float]) -> Iterator[Busy]:
    """A meter that reads a counter of busy seconds around the block.

    An emulated device's counter is the seconds that its compute has waited; time.process_time is a CPU's.
    """
    busy = Busy()
    start_s, start_busy_s = time.perf_counter(), busy_s()
    try:
        yield busy
    finally:
        busy.percent = percent_of(busy_s() - start_busy_s, time.perf_counter() - start_s)


def percent_of(busy_s: float, wall_s: float) -> float:
    """Busy seconds as a share of the wall time; 0 where no time passed."""
    return 100 * busy_s / wall_s if wall_s > 0 else 0.0


@contextmanager
def _cuda_meter(device: torch.device) -> Iterator[Busy]:
    nvml, busy = _nvml(), Busy()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _no_utilization(device, error) from error
    try:
        sampler = _Sampler(nvml, device)
        sampler.thread.start()
        try:
            yield busy
        finally:
            sampler.stop()
        busy.percent = sampler.mean()
    finally:
        nvml.nvmlShutdown()


@dataclass
class _Sampler:
    """Asks the driver every SAMPLE_S from a thread; the first time one period in, since answers look back."""

    nvml: Any
    device: torch.device
    samples: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._error: Exception | None = None
        self._ended = threading.Event()
        self._handle = self._find()
        self.thread = threading.Thread(target=self._run, name="ds_moe_ep busy", daemon=True)

    def stop(self) -> None:
        self._ended.set()
        self.thread.join()

    def mean(self) -> float:
        """The mean of the samples. Raises EngineError where asking failed."""
        if self._error is not None:
            raise _no_utilization(self.device, self._error) from self._error
        return sum(self.samples) / len(self.samples)

    def _find(self) -> Any:
        """NVML's handle, by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, and not NVML's."""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        try:
            return self.nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        except self.nvml.NVMLError as error:
            raise _no_utilization(self.device, error) from error

    def _run(self) -> None:
        try:
            while True:
                is_last = self._ended.wait(SAMPLE_S)
                if not is_last or not self.samples:  # a block shorter than a period still has one
                    self.samples.append(float(self.nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
                if is_last:
                    return
        except Exception as error:  # a thread's error is told where the block ends
            self._error = error


def _nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise EngineError(
            "bench.device='cuda': the busy fraction is read through nvidia-ml-py, which is not installed; "
            "run `pip install nvidia-ml-py` (the extra `gpu`)"
        ) from error


def _no_utilization(device: torch.device, error: Exception) -> EngineError:
    return EngineError(
        f"bench.device={str(device)!r}: the driver tells no utilization ({error}); it has none for slices of a device "
        "(MIG) and none without NVML: use a whole device with its driver's libraries"
    )
