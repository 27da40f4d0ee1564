"""Small numbers between the host and the device, without a copy for which the host waits.

A copy from or to pageable memory makes the host wait for all that the device has to do. From pinned memory it takes its
turn on the stream: the host goes on, and waits for an event where it needs what was copied.
"""

from __future__ import annotations

from array import array  # from which a tensor is made ten times as fast as from a list
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """The integers [n] on the device. Local, no device sync."""
    on_host = torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
    if not runs_beside_the_host(device):
        return on_host.to(device)
    return pinned_like(on_host).to(device, non_blocking=True)


class CopyToHost:
    """A tensor on its way to the host. What is launched behind its start runs while the host waits."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._event = tensor, None
        if runs_beside_the_host(tensor.device):
            self._tensor = empty_pinned(tensor)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))  # of its device, which need not be current

    def wait(self) -> Any:
        """The numbers as nested lists. One host sync."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


def runs_beside_the_host(device: torch.device) -> bool:
    """True for a device whose queue the host fills without a wait."""
    return device.type == "cuda"


def is_on_host(device: torch.device) -> bool:
    """True for tensors that the host reads without waiting for a device."""
    return device.type == "cpu" and not runs_beside_the_host(device)


def empty_pinned(like: Tensor) -> Tensor:
    """Pinned host memory of a tensor's shape. The allocator hands it out again behind the copies that used it."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def pinned_like(on_host: Tensor) -> Tensor:
    """The host's numbers in pinned memory."""
    return empty_pinned(on_host).copy_(on_host)
