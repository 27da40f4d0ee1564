"""The bytes of a tensor, and their checksum: what files keep beside it, and what ranks compare."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes in host memory, in its own where they lie there in one run. Local."""
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def crc32_of(tensor: Tensor, start: int = 0) -> int:
    """The CRC-32 of a tensor's bytes, behind those whose CRC-32 is `start`. Local."""
    return zlib.crc32(bytes_of(tensor), start)
