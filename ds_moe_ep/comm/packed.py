"""Columns that all ranks tell all others, packed: small numbers in 32 bits, others in 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The first `num_small` of a rank's `num_told` columns are numbers below 2^31."""

    num_told: int
    num_small: int

    def fits(self, size: int, room: int) -> bool:
        """True where the columns of `size` ranks, and one rank's as they are, fit into a message of so many columns."""
        return max(self._num_small_packed(size) + size * self._num_others, self.num_told) <= room

    def pack(self, told_PC: Tensor) -> Tensor:
        """The columns of all ranks as one row."""
        small_PC, others_PC = told_PC[:, : self.num_told].split([self.num_small, self._num_others], 1)
        small = torch.nn.functional.pad(small_PC.flatten().int(), (0, small_PC.numel() % 2))
        return torch.cat([small.view(torch.int64), others_PC.flatten()])

    def unpack(self, packed_C: Tensor, size: int) -> list[list[int]]:
        """The columns of each rank."""
        start, num_small = self._num_small_packed(size), size * self.num_small
        small = packed_C[:start].view(torch.int32)[:num_small].view(size, -1).tolist()
        others = packed_C[start : start + size * self._num_others].view(size, self._num_others).tolist()
        return [[*a, *b] for a, b in zip(small, others, strict=True)]

    @property
    def _num_others(self) -> int:
        return self.num_told - self.num_small

    def _num_small_packed(self, size: int) -> int:
        return -(-size * self.num_small // 2)
