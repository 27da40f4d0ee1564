"""Which ranks serve copies of hot experts during one window, the micro-batches of an optimizer step.

Weights do not change between optimizer steps, so that a copy of an expert serves a whole window: its weights travel
once at the window's start, its gradient sums once at the end. A rank has its own experts and a few slots for guests.

1. `_filled` brings the fullest rank down to a level by copies: the largest excess first, into the rank whose room fits
   it best, or, where slots are scarcer than room, in chains: a full rank gives an idle one all that fits, and takes
   from the next with the room that this leaves, as in the alias method (Walker 1977; Vose 1991). The lowest level for
   which slots suffice is found by bisection; higher levels need fewer copies.
2. `price_us` tells what a window takes: the fullest rank's rows, and the transfers that no computation hides.
3. `place` takes the cheapest, and keeps the previous placement unless another gains more than a margin.

All of it is a function of whole numbers and of prices that the ranks share, so all ranks come to the same placement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal
from zlib import crc32

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.levelling import level
from ds_moe_ep.schedule.price import Costs
from ds_moe_ep.schedule.way_home import rounds_home

MARGIN = 0.02  # of a window's price: a gain below it is not worth another placement
MAX_AUTO_SLOTS = 4  # each costs an expert's memory on every rank, and the second gains little already
PARTS = 1024  # of a row, so that smoothed loads are whole numbers
BISECTIONS = 12  # of the level: to 1/4096 of the excess
FEWER_COPIES = (0.1, 0.25, 0.5)  # levels on the way back up to the excess of no copies


@dataclass(frozen=True)
class Placement:
    """Guests of each rank of one layer's expert group, for one window.

    `guests_RS`: the expert, by its index over the group, in each slot of each rank; None where the slot is empty.
    An expert's home is the rank that owns it: consecutive experts lie on one rank.
    """

    ranks: int
    local_experts: int
    slots: int
    guests_RS: tuple[tuple[int | None, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.guests_RS) == self.ranks and all(len(guests) == self.slots for guests in self.guests_RS)
        for rank, guests in enumerate(self.guests_RS):
            present = [guest for guest in guests if guest is not None]
            assert len(set(present)) == len(present), f"rank {rank} has a guest twice"
            assert all(0 <= guest < self.num_experts and self.home(guest) != rank for guest in present)

    @classmethod
    def without_guests(cls, ranks: int, local_experts: int, slots: int = 0) -> Placement:
        """The placement in which every expert is at home alone."""
        return cls(ranks, local_experts, slots, ((None,) * slots,) * ranks)

    @property
    def num_experts(self) -> int:
        return self.ranks * self.local_experts

    def home(self, expert: int) -> int:
        """The rank that owns the expert."""
        return expert // self.local_experts

    @cached_property
    def copies(self) -> tuple[tuple[int, int, int], ...]:
        """(expert, rank, slot) of each guest, in the order of experts and then ranks: the transfers of a window."""
        return tuple(
            sorted(
                (guest, rank, slot)
                for rank, guests in enumerate(self.guests_RS)
                for slot, guest in enumerate(guests)
                if guest is not None
            )
        )

    @cached_property
    def hosts_E(self) -> Mapping[int, tuple[int, ...]]:
        """Hosts of each expert that has more than one, its home first, then by rank."""
        found: dict[int, tuple[int, ...]] = {}
        for expert, rank, _ in self.copies:
            found[expert] = (*found.get(expert, (self.home(expert),)), rank)
        return found

    def hosts(self, expert: int) -> tuple[int, ...]:
        """The ranks that compute the expert's rows, its home first."""
        return self.hosts_E.get(expert, (self.home(expert),))

    def place_on(self, rank: int, expert: int) -> int:
        """The expert's place among those that the rank computes: its own ones, and behind them its slots."""
        if self.home(expert) == rank:
            return expert % self.local_experts
        return self.local_experts + self.guests_RS[rank].index(expert)

    @property
    def key(self) -> int:
        """A number that is equal where placements are, in every process: the ranks compare it."""
        return crc32(repr((self.ranks, self.local_experts, self.slots, self.guests_RS)).encode())


@dataclass(frozen=True, kw_only=True)
class CopyCosts:
    """Times in microseconds by which placements are priced, the same on every rank.

    `row_us`: one row through its expert, forward and backward. `near_us`, `far_us`: the weights of one expert to a
    rank of the same node, and to one of another. `gradient_ratio`: bytes of an expert's gradient sums over those of
    its weights. `hidden_us`: time of the window under which such transfers cost nothing.
    """

    row_us: float
    near_us: float = 0.0
    far_us: float = 0.0
    gradient_ratio: float = 2.0
    hidden_us: float = 0.0
    micro_batches: int = 1

    @classmethod
    def of(
        cls,
        costs: Costs,
        torus: Torus,
        num_rows: float,
        row_bytes: float,
        weight_bytes: float,
        gradient_bytes: float,
        micro_batches: int,
    ) -> CopyCosts:
        """The costs that follow from those of a schedule, for `num_rows` rows per rank.

        The links' rates are those of its exchanges of rows; transfers hide under a layer's passes, where rows leave
        time for them.
        """
        compute_us = costs.forward_us + costs.input_grad_us + costs.weight_grad_us
        rows_us = 4 * max(costs.near_us, costs.far_us)  # dispatch and combine, there and back
        near = torus.node_size if torus.num_nodes > 1 else 1  # as price.py counts near and far rows
        near_bytes, far_bytes = ((n * num_rows * row_bytes / torus.size) for n in (near - 1, torus.size - near))
        near_us = costs.near_us * weight_bytes / near_bytes if near_bytes else 0.0
        far_us = costs.far_us * weight_bytes / far_bytes if far_bytes else 0.0
        return cls(
            row_us=compute_us / max(num_rows, 1.0),
            near_us=near_us if torus.num_nodes > 1 else far_us,
            far_us=far_us,
            gradient_ratio=gradient_bytes / weight_bytes,
            hidden_us=max(compute_us - rows_us, 0.0),
            micro_batches=micro_batches,
        )


def price_us(rows_E: Sequence[float], placement: Placement, torus: Torus, costs: CopyCosts) -> float:
    """Microseconds of a window whose micro-batches have so many rows for each expert of the group."""
    return _price(_whole(rows_E), placement, torus, costs)


def place(
    rows_E: Sequence[float],
    torus: Torus,
    slots: int | Literal["auto"],
    costs: CopyCosts,
    previous: Placement | None = None,
) -> Placement:
    """The placement of the next window, for these rows per micro-batch: never dearer than none by its own price.

    "auto" takes as many slots as pay. The previous placement stays unless another is cheaper by MARGIN, or as cheap
    with fewer copies.
    """
    rows, local = _whole(rows_E), len(rows_E) // torus.size
    most = min(MAX_AUTO_SLOTS if slots == "auto" else slots, len(rows_E) - local)
    none = Placement.without_guests(torus.size, local, 0 if slots == "auto" else slots)
    before = previous if previous is not None and _fits(previous, none, slots, most) else none
    prices = {placement: _price(rows, placement, torus, costs) for placement in (none, before)}
    kept = min((none, before), key=lambda placement: (prices[placement], len(placement.copies)))
    least_us = costs.micro_batches * costs.row_us * sum(rows) / PARTS / torus.size  # of levelled rows, with no transfer
    if prices[kept] <= (1 + MARGIN) * least_us:
        return kept
    best, best_us = kept, prices[kept]
    for num_slots in range(1, most + 1) if slots == "auto" else [most] * (most > 0):
        for found in _candidates(rows, torus, num_slots, none.slots):
            found_us = _price(rows, found, torus, costs)
            is_cheaper = found_us < best_us * (1 - MARGIN * (found.slots > best.slots))
            if is_cheaper or (found_us <= best_us and len(found.copies) < len(best.copies)):
                best, best_us = found, found_us
    is_worth_it = best_us < prices[kept] * (1 - MARGIN) or len(best.copies) < len(kept.copies)
    return best if is_worth_it else kept


def _fits(previous: Placement, none: Placement, slots: int | Literal["auto"], most: int) -> bool:
    is_alike = (previous.ranks, previous.local_experts) == (none.ranks, none.local_experts)
    return is_alike and (previous.slots <= most if slots == "auto" else previous.slots == none.slots)


def _whole(rows_E: Sequence[float]) -> list[int]:
    return [round(rows * PARTS) for rows in rows_E]


def _price(rows: Sequence[int], placement: Placement, torus: Torus, costs: CopyCosts) -> float:
    fullest = max(levelled_rows(rows, placement))
    transfer_us = max(_transfer_us(placement, torus, costs) - costs.hidden_us, 0.0)
    return costs.micro_batches * costs.row_us * fullest / PARTS + transfer_us


def levelled_rows(rows_E: Sequence[int], placement: Placement) -> list[int]:
    """Rows of each rank where every expert's rows are levelled over its hosts."""
    load_R = home_rows(rows_E, placement)
    for expert, quotas in level(rows_E, placement.hosts_E, load_R).items():
        for host, rows in zip(placement.hosts_E[expert], quotas, strict=True):
            load_R[host] += rows
    return load_R


def home_rows(rows_E: Sequence[int], placement: Placement) -> list[int]:
    """Rows of each rank's own experts that are computed nowhere else."""
    load_R, local = [0] * placement.ranks, placement.local_experts
    for expert, rows in enumerate(rows_E):
        if expert not in placement.hosts_E:
            load_R[expert // local] += rows
    return load_R


def _transfer_us(placement: Placement, torus: Torus, costs: CopyCosts) -> float:
    """Time of all copies' weights, and of the rounds in which their gradient sums go home."""
    copies = {(expert, rank): 1 for expert, rank, _ in placement.copies}
    weights = [(placement.home(expert), rank) for expert, rank in copies]
    rounds = [[(move.source, move.target) for move in moves] for moves in rounds_home(copies, placement.home)]
    sums_us = sum(_busiest_us(pairs, torus, costs) for pairs in rounds)
    return _busiest_us(weights, torus, costs) + costs.gradient_ratio * sums_us


def _busiest_us(pairs: Sequence[tuple[int, int]], torus: Torus, costs: CopyCosts) -> float:
    """Time of one expert's weights from source to target of each pair, on the link that carries most of them."""
    time_of: dict[tuple[str, bool, int], float] = {}
    for source, target in pairs:
        is_far = source // torus.node_size != target // torus.node_size
        for end in (("sends", is_far, source), ("receives", is_far, target)):
            time_of[end] = time_of.get(end, 0.0) + (costs.far_us if is_far else costs.near_us)
    return max(time_of.values(), default=0.0)


def _candidates(rows: Sequence[int], torus: Torus, num_slots: int, width: int) -> Iterator[Placement]:
    """Placements with up to so many copies per rank: at the lowest level that is reached, and with fewer copies."""
    local = len(rows) // torus.size
    load_R = [sum(rows[start : start + local]) for start in range(0, len(rows), local)]
    top, mean = max(load_R), -(-sum(rows) // torus.size)
    seen: set[Placement] = set()
    ways = (True, False) if torus.num_nodes > 1 and torus.node_size > 1 else (False,)
    for near_first, in_chains in product(ways, (False, True)):
        low, high = mean, top
        almost = mean + ((top - mean) >> BISECTIONS)  # as low as the bisection tells levels apart
        if _filled(rows, load_R, torus, num_slots, almost, near_first, in_chains) is not None:
            low = high = almost
        for _ in range(BISECTIONS):
            if low >= high:
                break
            middle = (low + high) // 2
            if _filled(rows, load_R, torus, num_slots, middle, near_first, in_chains) is None:
                low = middle + 1
            else:
                high = middle
        for share in (0.0, *FEWER_COPIES):
            surface = high + int(share * (top - high))
            guests = _filled(rows, load_R, torus, num_slots, surface, near_first, in_chains)
            if guests is None:
                continue
            slots = max(width, max(map(len, guests)))
            found = Placement(torus.size, local, slots, tuple((*own, *[None] * (slots - len(own))) for own in guests))
            if found not in seen:
                seen.add(found)
                yield found


def _filled(
    rows: Sequence[int],
    load_R: Sequence[int],
    torus: Torus,
    num_slots: int,
    surface: int,
    near_first: bool,
    in_chains: bool,
) -> list[list[int]] | None:
    """Guests of each rank with which none has more than `surface` rows, or None where slots or room do not suffice.

    With `in_chains` a host is filled, whatever its guest's home has too much of: that home may then be a host itself.
    """
    local = len(rows) // torus.size
    room_R, guests = [surface - load for load in load_R], [list[int]() for _ in load_R]
    excess = [-room for room in room_R]
    for rank in sorted((r for r in range(torus.size) if excess[r] > 0), key=lambda r: (-excess[r], r)):
        own = sorted(range(rank * local, (rank + 1) * local), key=lambda expert: (-rows[expert], expert))
        for expert in own:
            left, moved = min(excess[rank], rows[expert]), 0
            excess[rank] -= left
            while left > 0:
                host = _host_for(left, rank, expert, room_R, guests, torus, num_slots, near_first)
                if host is None:
                    break
                taken = min(rows[expert] - moved if in_chains else left, room_R[host])
                guests[host].append(expert)
                room_R[host] -= taken
                room_R[rank] += taken
                moved += taken
                left = max(left - taken, 0)
            excess[rank] += left
        if excess[rank] > 0:
            return None
    return guests


def _host_for(
    rows: int,
    rank: int,
    expert: int,
    room_R: Sequence[int],
    guests: Sequence[Sequence[int]],
    torus: Torus,
    num_slots: int,
    near_first: bool,
) -> int | None:
    """The rank with the smallest room for all of these rows, else the largest room; None where no slot is left."""

    def order(host: int) -> tuple[bool, bool, int, int]:
        is_far, holds_all = host // torus.node_size != rank // torus.node_size, room_R[host] >= rows
        return near_first and is_far, not holds_all, room_R[host] if holds_all else -room_R[host], host

    free = (h for h in range(torus.size) if room_R[h] > 0 and len(guests[h]) < num_slots and expert not in guests[h])
    return min(free, key=order, default=None)
