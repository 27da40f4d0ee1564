"""Columns that ranks tell each other come out of their packing as they went in, and are as short as they can be."""

from __future__ import annotations

import pytest
import torch

from ds_moe_ep.comm.packed import Packing


@pytest.mark.parametrize(
    ("size", "num_told", "num_small"), [(1, 1, 1), (3, 5, 5), (3, 5, 3), (16, 20, 16), (4, 2, 0)], ids=str
)
def test_columns_of_all_ranks_come_out_as_they_were_told(size: int, num_told: int, num_small: int) -> None:
    packing, generator = Packing(num_told, num_small), torch.Generator().manual_seed(size)
    told_PC = torch.randint(2**31, (size, num_told), generator=generator)
    told_PC[:, num_small:] = -told_PC[:, num_small:] * 2**31  # whole numbers of 64 bits
    with_more = torch.cat([told_PC, torch.full((size, 3), 7)], 1)  # what is behind is no part of it
    packed = packing.pack(with_more)
    assert packing.unpack(torch.cat([packed, torch.zeros(9, dtype=torch.int64)]), size) == told_PC.tolist()
    assert packing.fits(size, max(len(packed), num_told)) and not packing.fits(size, max(len(packed), num_told) - 1)


def test_sixteen_ranks_with_an_expert_and_a_slot_each_fit_into_sixteen_columns_per_rank() -> None:
    assert Packing(num_told=16 + 3 + 1, num_small=16).fits(16, 16 * 16)
