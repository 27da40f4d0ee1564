"""Weights of guests, sent from their homes to the slots of their hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import Message, Transfer, Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.replicas.told import digest, present
from ds_moe_ep.moe.split_experts import Weights
from ds_moe_ep.schedule.placement import Placement
from ds_moe_ep.schedule.spans import Tags

ROWS = torch.contiguous_format


def message(peer: int, tensor: Tensor) -> Message:
    """A whole tensor as one message."""
    rows = tensor.view(len(tensor), -1)
    return Message(peer, rows, 0, len(rows))


@dataclass(frozen=True)
class Copies:
    """The copies of one window: those on this rank, and the digests of what it lent. Buffers, and no parameters."""

    placement: Placement
    held: tuple[Weights | None, ...]  # by slot
    lent: tuple[Tensor | None, ...]  # a digest for each own expert that has copies
    transfer: Transfer
    sent: tuple[Tensor, ...]  # kept until the transfer is over

    @classmethod
    def none(cls, placement: Placement, num_slots: int) -> Copies:
        """The copies of a placement without guests."""
        return cls(placement, (None,) * num_slots, (None,) * placement.local_experts, _NOTHING, ())

    @classmethod
    def start(cls, placement: Placement, own: Sequence[Weights], link: Transport, tags: Tags, num_slots: int) -> Copies:
        """Starts to send this rank's experts to their hosts, and to receive its guests. Collective."""
        lent: list[Tensor | None] = [None] * len(own)
        sends, receives = list[Message](), list[Message]()
        first = link.rank * placement.local_experts
        with torch.inference_mode(False), torch.no_grad():
            guests = [expert for expert in placement.guests_RS[link.rank] if expert is not None]
            room = iter(_room_for(guests, own[0], tags.layer))
            held = [None if expert is None else next(room) for expert in placement.guests_RS[link.rank]]
            held += [None] * (num_slots - len(held))
            for expert, rank, slot in placement.copies:
                if placement.home(expert) == link.rank:
                    lent[expert - first] = digest(own[expert - first])
                    sends += [message(rank, weight.detach().contiguous()) for weight in present(own[expert - first])]
                elif (guest := held[slot] if rank == link.rank else None) is not None:
                    receives += [message(placement.home(expert), weight) for weight in present(guest)]
        transfer = _Once(link.start("replicas", sends, receives, tags))
        return cls(placement, tuple(held), tuple(lent), transfer, tuple(each.buffer_RD for each in sends))


class _Once:
    """A transfer that may be waited for again."""

    def __init__(self, transfer: Transfer | None) -> None:
        self._transfer = transfer

    def wait(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.wait()


_NOTHING = _Once(None)


def _room_for(guests: Sequence[int], named: Weights, layer: str) -> list[Weights]:
    """Room for the weights of these experts, side by side, so that their products can be grouped.

    Raises EngineError where there is none.
    """
    num = len(guests)
    try:
        together = {
            name: None if weight is None else torch.empty_like(weight.expand(num, *weight.shape), memory_format=ROWS)
            for name, weight in named.items()
        }
    except RuntimeError as error:  # torch's out of memory is one, on any device
        num_bytes = num * sum(weight.numel() * weight.element_size() for weight in present(named))
        whose = f"a copy of expert {guests[0]}" if num == 1 else f"copies of experts {', '.join(map(str, guests))}"
        raise EngineError(
            f"{layer or 'MoE layer'}: no memory for {whose}, {num_bytes:,} bytes ({error}); lower "
            "moe_ep.replicas, or set it to 0"
        ) from error
    return [{name: None if room is None else room[place] for name, room in together.items()} for place in range(num)]
