"""Comparisons of what ranks are about to do with copies, before they do it. A message per rank and way, on the host.

They are as long as those of heads: whatever ranks do, their messages meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import is_on_host
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.health.diagnosis import ranks_named
from ds_moe_ep.moe.agreement import (
    NUM_COLUMNS,
    NUM_HEAD,
    NUM_VERDICT,
    ROOM,
    Agreement,
    Call,
    CountsHeader,
    Head,
    Mode,
    consult_on,
    exchange_heads,
    place_of,
)
from ds_moe_ep.schedule.spans import Tags


def check_keys(link: Transport, keys: Sequence[tuple[Tags, int]], device: torch.device) -> None:
    """Raises EngineError, on every rank, where ranks came to different placements of a layer. Collective; a sync.

    `keys`: of each layer, where it is and its placement's key. All of them are compared at once.
    """
    if len(keys) > 1:
        together = crc32(repr([key for _, key in keys]).encode())
        if len(set(keys_of_all(link, together, device, keys[0][0]))) == 1:
            return
    for tags, key in keys:
        found = keys_of_all(link, key, device, tags)
        odd = [link.ranks[peer] for peer, its in enumerate(found) if its != found[0]]
        if odd:
            raise EngineError(
                f"{tags.layer or 'MoE layer'}: {ranks_named(odd)} came to another placement of copies than rank "
                f"{link.ranks[0]}: the ranks have seen other loads; give every rank the same configuration, and "
                "start all of them from one checkpoint"
            )


def keys_of_all(link: Transport, key: int, device: torch.device, tags: Tags) -> list[int]:
    """The key that each rank of the group has. Collective; a device sync.

    On the host it is an exchange of heads: a rank that compares alone is told of by those in a pass.
    """
    if not is_on_host(device):
        own_PC = torch.zeros(link.size, NUM_COLUMNS, dtype=torch.int64, device=device)
        own_PC[:, 0] = key
        return link.exchange_counts(own_PC, tags)[:, 0].tolist()
    call, layer = Call(tags.layer, mode=Mode.PLACEMENT), crc32(tags.layer.encode())
    own = Head(CountsHeader(0, 0, -1, 0, layer, call.number, call.mode, 0, 0, placement=key))
    if consult_on(link, own.columns(), [], call)().tolist()[0]:
        return [key] * link.size
    rows = exchange_heads(link, own.columns(), call)
    heads = [Head.read(row) for row in rows]
    if any(place_of(head) != place_of(own) for head in heads):
        Agreement(link, call, 0, (0, torch.float32)).check(own, rows, device)
    return [head.header.placement for head in heads]


def odd_pair(
    transport: Transport, sent_P: Sequence[int], expected_P: Sequence[int], tags: Tags
) -> tuple[int, int] | None:
    """The first ranks (source, target) of which one sends other messages than the other expects; None without any.

    Each rank gives a digest of what it sends to each peer, and of what it expects of each. Collective, on the host.
    """
    size = transport.size
    told_C = torch.tensor([*sent_P, *expected_P, *[0] * (NUM_HEAD + (ROOM - 2) * size)])  # as long as a head's
    answer = transport.consult(told_C, NUM_VERDICT + ROOM * size, _answers_of_pairs, tags)().tolist()
    return None if answer[0] else (answer[1], answer[2])


def _answers_of_pairs(told_PC: Tensor) -> Tensor:
    """The first rank's answer to each: whether all expect what is sent, and the first pair that does not."""
    size = len(told_PC)
    answers_PA = told_PC.new_zeros(size, NUM_VERDICT + ROOM * size)
    odd = (told_PC[:, :size] != told_PC[:, size : 2 * size].t()).nonzero()
    if len(odd):
        answers_PA[:, 1:3] = odd[0]
    else:
        answers_PA[:, 0] = 1
    return answers_PA
