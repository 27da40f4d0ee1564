"""Guests of each rank that level given rows: as few copies as reach a level, or every slot in use.

1. `filled` brings the fullest rank down to a level by copies: the largest excess first, into the rank whose room fits
   it best, or, where slots are scarcer than room, in chains: a full rank gives an idle one all that fits, and takes
   from the next with the room that this leaves, as in the alias method (Walker 1977; Vose 1991). The lowest level for
   which slots suffice is found by bisection; higher levels need fewer copies.
2. `spread` fills slot after slot, each with the expert that has the most rows per host, as seats are given to parties
   (D'Hondt). Ranks then share experts with several others, and water filling levels loads that are not quite those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, product

from ds_moe_ep.config.topology import Torus

BISECTIONS = 12  # of the level: to 1/4096 of the excess
FEWER_COPIES = (0.05, 0.1, 0.25, 0.5)  # levels on the way back up to the excess of no copies
SPREADS = (0.25, 0.5, 0.75)  # of all slots, where some copies are enough

Guests = list[list[int]]  # of each rank


def levelled(rows: Sequence[int], torus: Torus, num_slots: int) -> Iterator[Guests]:
    """Guests with up to so many copies per rank: at the lowest level that is reached, and with fewer copies."""
    local = len(rows) // torus.size
    load_R = [sum(rows[start : start + local]) for start in range(0, len(rows), local)]
    top, mean = max(load_R), -(-sum(rows) // torus.size)
    ways = (True, False) if torus.num_nodes > 1 and torus.node_size > 1 else (False,)
    for near_first, in_chains in product(ways, (False, True)):
        low, high = mean, top
        almost = mean + ((top - mean) >> BISECTIONS)  # as low as the bisection tells levels apart
        if filled(rows, load_R, torus, num_slots, almost, near_first, in_chains) is not None:
            low = high = almost
        for _ in range(BISECTIONS):
            if low >= high:
                break
            middle = (low + high) // 2
            if filled(rows, load_R, torus, num_slots, middle, near_first, in_chains) is None:
                low = middle + 1
            else:
                high = middle
        for share in (0.0, *FEWER_COPIES):
            surface = high + int(share * (top - high))
            guests = filled(rows, load_R, torus, num_slots, surface, near_first, in_chains)
            if guests is not None:
                yield guests


def spread(rows: Sequence[int], torus: Torus, num_slots: int) -> Iterator[Guests]:
    """Guests in some of the slots, and in all of them."""
    size, local = torus.size, len(rows) // torus.size
    guests: Guests = [[] for _ in range(size)]
    num_hosts, num = [1] * len(rows), size * num_slots
    stops = {*(round(share * num) for share in SPREADS), num}
    for copies in range(1, num + 1):
        share_E = [r / hosts for r, hosts in zip(rows, num_hosts, strict=True)]
        load_R = [sum(share_E[rank * local : (rank + 1) * local]) for rank in range(size)]
        for rank, its in enumerate(guests):
            load_R[rank] += sum([share_E[expert] for expert in its])
        free = sorted((rank for rank in range(size) if len(guests[rank]) < num_slots), key=lambda r: (load_R[r], r))
        for expert in sorted(range(len(rows)), key=lambda expert: (-share_E[expert], expert)):
            host = next((r for r in free if r != expert // local and expert not in guests[r]), None)
            if host is not None:
                guests[host].append(expert)
                num_hosts[expert] += 1
                break
        if copies in stops:
            yield [list(its) for its in guests]


def filled(
    rows: Sequence[int],
    load_R: Sequence[int],
    torus: Torus,
    num_slots: int,
    surface: int,
    near_first: bool,
    in_chains: bool,
) -> Guests | None:
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
    """The rank with the smallest room for all of these rows, else the largest room; None where no slot is left.

    With `near_first` ranks of the home's node go before all others.
    """
    groups: tuple[Iterable[int], ...] = (range(torus.size),)
    if near_first:
        first = rank // torus.node_size * torus.node_size
        near = range(first, first + torus.node_size)
        groups = near, chain(range(first), range(first + torus.node_size, torus.size))
    for hosts in groups:
        smallest = largest = -1
        for host in hosts:
            room = room_R[host]
            if room <= 0 or len(guests[host]) >= num_slots or expert in guests[host]:
                continue
            if room >= rows:
                if smallest < 0 or room < room_R[smallest]:
                    smallest = host
            elif largest < 0 or room > room_R[largest]:
                largest = host
        if smallest >= 0 or largest >= 0:
            return smallest if smallest >= 0 else largest
    return None


def lowest_levels(rows: Sequence[int], torus: Torus, num_slots: int) -> list[float]:
    """Rows that the fullest rank has at least, by the number of copies from none on to as many as there are slots.

    Of n copies at most n ranks give rows away, so that the one behind them keeps what it has; and at most n take some,
    up to the level: whatever the k fullest have above it, the n emptiest have room for.
    """
    local = len(rows) // torus.size
    load_R = sorted((sum(rows[start : start + local]) for start in range(0, len(rows), local)), reverse=True)
    top, bottom = [0, *accumulate(load_R)], [0, *accumulate(reversed(load_R))]
    mean, num_ranks = top[-1] / len(load_R), len(load_R)
    found, lowest_K = [float(load_R[0])], [total / k for k, total in enumerate(top) if k]
    for n in range(1, num_ranks):
        lowest_K = [
            min(lowest, (given + bottom[n]) / (k + n))
            for k, (lowest, given) in enumerate(zip(lowest_K, top[1:], strict=True), 1)
        ]
        found.append(max(mean, load_R[n], *lowest_K))
    return [*found, *[mean] * (num_slots * num_ranks + 1 - len(found))]
