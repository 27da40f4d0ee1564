"""Peak memory of a layer's forward and backward, as the system sees it.

On CUDA the allocator keeps the peak (torch.cuda.max_memory_allocated). On a CPU torch keeps none, and what
its profiler counts leaves out every thread but the caller's, the backend's buffers and what a matrix library
takes. So the kernel counts: the process's resident peak (VmHWM, reset through /proc/self/clear_refs) above
the resident size before the layer was built. Three things make that repeatable to about 0.2 MB:

1. `return_freed_memory`, called when the process starts, tells malloc to map every block of 64 KiB and more
   by itself and to give it back when freed, so that the peak is what is alive and not what the heap keeps. It
   makes allocation slow for the rest of the process, and cannot return what the heap took before: memory is
   measured in processes of its own, time in others.
2. Huge pages are off: one touch of theirs would count 2 MiB.
3. A layer of the same kind has run before in the process, so code and library buffers are there already.

The peak holds parameters, tokens, activations, gradients and buffers. It is taken over several steps, the
first among them, so that what a layer keeps for the next step counts.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ds_moe_ep.errors import EngineError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PR_SET_THP_DISABLE = 41  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MAPPED_BYTES = 64 * 1024

Step = Callable[[], object]


def peak_bytes(build: Callable[[], Step], device: torch.device, *, steps: int = 3) -> int:
    """Peak bytes of `steps` runs of what `build` returns, above the memory before it was built.

    The transient memory of building does not count. Local to this process; the step itself may be collective.
    Raises EngineError on a CPU whose system is not Linux.
    """
    meter: CudaMeter | HostMeter = CudaMeter(device) if device.type == "cuda" else HostMeter()
    gc.collect()
    before = meter.used()
    step = build()
    gc.collect()
    meter.reset()
    for _ in range(steps):
        step()
    return max(meter.peak() - before, 0)


class CudaMeter:
    """Memory of torch's allocator on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def reset(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


def return_freed_memory() -> None:
    """From now on large blocks go back to the system when freed. Linux; for this process, for good."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MAPPED_BYTES)


class HostMeter:
    """Resident memory of this process, as the kernel counts it. Raises EngineError where the system is not Linux."""

    def __init__(self) -> None:
        if not sys.platform.startswith("linux") or not CLEAR.exists():
            raise EngineError(
                f"bench.device='cpu' on {sys.platform}: peak memory is read from {CLEAR}, which Linux alone "
                "has; leave memory out with --no-memory"
            )
        self._libc = ctypes.CDLL(None)

    def used(self) -> int:
        self._trim()
        return _status_bytes("VmRSS")

    def reset(self) -> None:
        self._trim()
        CLEAR.write_text("5")  # sets VmHWM to the present resident size

    def peak(self) -> int:
        return _status_bytes("VmHWM")

    def _trim(self) -> None:
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise EngineError(f"bench.memory: {STATUS} has no {key}; leave memory out with --no-memory")
