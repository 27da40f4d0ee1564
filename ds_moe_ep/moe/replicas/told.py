"""Everything about replicas that ranks tell each other in the exchange of counts, and what follows from it.

Each rank tells all others the same: rows per expert, which weights of its experts are trained, and digests of weights
that are lent and of the copies that it has. So a copy that is not what its home has is seen before a row moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.split_experts import Weights
from ds_moe_ep.schedule.placement import Placement

SAMPLES = 64  # of each tensor in a digest
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Told:
    """The answers of all ranks: rows [R][E], and per rank what it says of its own experts and of its slots."""

    rows_RE: list[list[int]]
    trained_E: list[int]  # a bit for each weight of the expert
    digest_E: list[int]  # of the weights now; 0 where no copy is out
    lent_E: list[int]  # of the weights when they were lent
    copy_RS: list[list[int]]  # of each rank's copies now

    @classmethod
    def read(cls, rows: Sequence[Sequence[int]], num_experts: int, num_local: int) -> Told:
        """The columns that `told_columns` made, of each rank."""
        starts = [0, num_experts, *(num_experts + i * num_local for i in (1, 2, 3))]
        cut = [[row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)] for row in rows]
        counts, trained, digests, lent, copies = ([list(row[i]) for row in cut] for i in range(5))
        return cls(counts, [*chain(*trained)], [*chain(*digests)], [*chain(*lent)], copies)

    def changed(self, placement: Placement) -> bool:
        """True where an expert whose copies are out is not what it was when they were made."""
        return any(self.digest_E[expert] != self.lent_E[expert] for expert, *_ in placement.copies)

    def check_copies(self, placement: Placement, layer: str, ranks: Sequence[int]) -> None:
        """Raises EngineError, on every rank, where a copy is not what its home lent."""
        for expert, rank, slot in placement.copies:
            if self.copy_RS[rank][slot] != self.lent_E[expert]:
                raise EngineError(
                    f"{layer or 'MoE layer'}: the copy of expert {expert} on rank {ranks[rank]} has other weights than "
                    f"its home, rank {ranks[placement.home(expert)]}, sent: nothing but the layer may write to copies; "
                    "start again from the last checkpoint, or set moe_ep.replicas to 0"
                )


def num_told(num_experts: int, num_local: int, slots: int) -> int:
    """Columns of what a rank tells."""
    return num_experts + 3 * num_local + slots


def told_columns(
    count_E: Tensor,
    own: Sequence[Weights],
    lent: Sequence[Tensor | None],
    copies: Sequence[Weights | None],
    digests: Digests,
) -> Tensor:
    """This rank's columns, on the device. No device sync.

    `lent` has the digest of each own expert whose copies are out, `copies` the weights in each slot.
    """
    device = count_E.device
    nothing = to_device([0], device)
    now = [nothing if was is None else digests.of(i, own[i]) for i, was in enumerate(lent)]
    before = [nothing if was is None else was for was in lent]
    held = [nothing if named is None else digests.of(~slot, named) for slot, named in enumerate(copies)]
    return torch.cat([count_E, to_device([trained_bits(named) for named in own], device), *now, *before, *held])


class Digests:
    """Digests of weights, made once for the passes of one mode between two changes of the weights.

    Torch counts what changes a tensor in place. What changes its memory past it, as an optimizer does, is seen where a
    window begins, or where training and evaluation take turns.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, Tensor]] = {}
        self._of: object = None

    def begin(self, of: object) -> None:
        """A pass begins: digests of passes with another `of` are not used."""
        if of != self._of:
            self._of, self._made = of, {}

    def of(self, place: int, named: Weights) -> Tensor:
        """The digest of the weights that lie in this place."""
        weights = present(named)
        if any(weight.is_inference() or torch.is_autocast_enabled(weight.device.type) for weight in weights):
            return digest(named)  # torch counts nothing there; or these are casts of the weights
        key = [(weight.data_ptr(), weight._version) for weight in weights]
        if place not in self._made or self._made[place][0] != key:
            self._made[place] = key, digest(named)
        return self._made[place][1]


@torch.no_grad()
def digest(named: Weights) -> Tensor:
    """A number [1] that tells weights apart: the sum of the bits of a sample of each, and their type's size."""
    samples = [weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLES)] for weight in present(named)]
    num_bytes = samples[0].element_size()
    return torch.cat(samples).view(BITS[num_bytes]).sum(dtype=torch.int64).view(1) + (num_bytes << 48)


def present(named: Weights) -> list[Tensor]:
    """The weights that there are, in the order of the expert's parameters."""
    return [weight for weight in named.values() if weight is not None]


def device_of(named: Weights) -> torch.device:
    """Where an expert's weights are."""
    return present(named)[0].device


def trained_bits(named: Weights) -> int:
    """A bit for each weight that needs a gradient, the first one lowest."""
    return sum(int(weight.requires_grad) << index for index, weight in enumerate(present(named)))
