"""The placements that `schedule/placement.py` looks for, found plainly: every candidate is made and priced.

The second implementation of the search: no bound cuts it short, and hosts are chosen by sorting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.copies import filling
from ds_moe_ep.schedule.copies.filling import Guests
from ds_moe_ep.schedule.placement import (
    MARGIN,
    MAX_AUTO_SLOTS,
    NEAR,
    PARTS,
    SLACK,
    SMALL,
    CopyCosts,
    Placement,
    levelled_rows,
    price_us,
)


def place_plainly(
    rows_E: Sequence[float],
    torus: Torus,
    slots: int | Literal["auto"],
    costs: CopyCosts,
    previous: Placement | None = None,
    others_E: Sequence[Sequence[float]] = (),
) -> Placement:
    """The placement of the next window, as `place` has it."""
    local, none_slots = len(rows_E) // torus.size, 0 if slots == "auto" else slots
    most = min(MAX_AUTO_SLOTS if slots == "auto" else slots, len(rows_E) - local)
    none = Placement.without_guests(torus.size, local, none_slots)

    def price(placement: Placement) -> float:
        return price_us(rows_E, placement, torus, costs, others_E)

    kept = none
    if previous is not None and (previous.slots <= most if slots == "auto" else previous.slots == slots):
        kept = min((none, previous), key=lambda placement: (price(placement), len(placement.copies)))
    whole = [round(rows * PARTS) for rows in rows_E]
    loads = [whole, *[[round(rows * PARTS) for rows in each] for each in others_E]]
    level_us = costs.micro_batches * costs.row_us * sum(map(sum, loads)) / len(loads) / PARTS / torus.size
    if price(kept) <= (1 + (NEAR if others_E else MARGIN)) * level_us:
        return kept
    best = kept
    for num_slots in range(1, most + 1) if slots == "auto" else [most] * (most > 0):
        for found in candidates(whole, torus, num_slots, none.slots, bool(others_E)):
            found_us, best_us = price(found), price(best)
            fullest = sum(max(levelled_rows(each, found, SLACK)) for each in loads) / len(loads)
            level_found_us = level_us + found_us - costs.micro_batches * costs.row_us * fullest / PARTS
            if level_found_us > best_us * (1 - SMALL) and len(found.copies) >= len(best.copies):
                continue  # even level it would gain too little
            is_cheaper = found_us < best_us * (1 - MARGIN * (found.slots > best.slots))
            if is_cheaper or (found_us <= best_us and len(found.copies) < len(best.copies)):
                best = found
    is_worth_it = price(best) < price(kept) * (1 - MARGIN) or len(best.copies) < len(kept.copies)
    return best if is_worth_it else kept


def candidates(rows: Sequence[int], torus: Torus, num_slots: int, width: int, moves: bool) -> Iterator[Placement]:
    """Placements with up to so many copies per rank."""
    for guests in (filling.spread if moves else filling.levelled)(rows, torus, num_slots):
        slots = max(width, max(map(len, guests)))
        padded = tuple((*own, *[None] * (slots - len(own))) for own in guests)
        yield Placement(torus.size, len(rows) // torus.size, slots, padded)


def host_by_sorting(
    rows: int,
    rank: int,
    expert: int,
    room_R: Sequence[int],
    guests: Guests,
    torus: Torus,
    num_slots: int,
    near_first: bool,
) -> int | None:
    """The rank with the smallest room for all of these rows, else the largest room; None where no slot is left."""

    def order(host: int) -> tuple[bool, bool, int, int]:
        is_far, holds_all = host // torus.node_size != rank // torus.node_size, room_R[host] >= rows
        return near_first and is_far, not holds_all, room_R[host] if holds_all else -room_R[host], host

    free = [h for h in range(torus.size) if room_R[h] > 0 and len(guests[h]) < num_slots and expert not in guests[h]]
    return min(free, key=order, default=None)
