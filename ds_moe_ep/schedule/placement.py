"""Which ranks serve copies of hot experts during one window, the micro-batches of an optimizer step.

Weights do not change between optimizer steps, so that a copy of an expert serves a whole window: its weights travel
once at the window's start, its gradient sums once at the end. A rank has its own experts and a few slots for guests.

1. `copies/filling.py` proposes guests: as few as level the loads, or, where loads move, some and all of the slots.
2. `price_us` tells what a window takes: the fullest rank's rows, and the transfers that no computation hides.
3. `place` takes the cheapest, and keeps the previous placement unless another gains more than a margin.

All of it is a function of whole numbers and of prices that the ranks share, so all ranks come to the same placement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal
from zlib import crc32

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.copies.filling import levelled, lowest_levels, spread
from ds_moe_ep.schedule.levelling import level
from ds_moe_ep.schedule.price import Costs
from ds_moe_ep.schedule.way_home import rounds_home

SMALL = 0.005  # of a window's price: a gain that cannot be more is not looked for
MARGIN = 0.02  # of a window's price: a gain below it is not worth another placement
MAX_AUTO_SLOTS = 4  # each costs an expert's memory on every rank, and the second gains little already
PARTS = 1024  # of a row, so that smoothed loads are whole numbers
NEAR = 0.05  # of level loads' price: nearer, no other placement is looked for where loads move
ROUNDING = 1e-9  # of a price: bounds are of other sums
SLACK = 64  # of the mean rows of a rank, one part: loads are levelled so far for their price


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
    its weights. `each_us`: the weights of one copy, on links that all copies share alike. `hidden_us`: time of the
    window under which such transfers cost nothing. `pass_share`: one copy in a pass, in parts of a rank's rows, beside
    which transfers go on.
    `pass_us`: one copy in a pass on its rank.
    """

    row_us: float
    near_us: float = 0.0
    far_us: float = 0.0
    each_us: float = 0.0
    pass_share: float = 0.0
    pass_us: float = 0.0
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

        The links' rates and latency are those of its exchanges of rows; transfers hide under a layer's passes, where
        rows leave time for them. In a pass a copy is taken to need a latency forward and one backward, as a small
        message does: its products are launches of their own.
        """
        compute_us = costs.forward_us + costs.input_grad_us + costs.weight_grad_us
        rows_us = 4 * max(costs.near_us, costs.far_us)  # dispatch and combine, there and back
        near = torus.node_size if torus.num_nodes > 1 else 1  # as price.py counts near and far rows
        near_bytes, far_bytes = ((n * num_rows * row_bytes / torus.size) for n in (near - 1, torus.size - near))
        near_us = costs.near_us * weight_bytes / near_bytes + costs.latency_us if near_bytes else 0.0
        far_us = costs.far_us * weight_bytes / far_bytes + costs.latency_us if far_bytes else 0.0
        return cls(
            row_us=compute_us / max(num_rows, 1.0),
            near_us=near_us if torus.num_nodes > 1 else far_us,
            far_us=far_us,
            pass_us=2 * costs.latency_us,
            gradient_ratio=gradient_bytes / weight_bytes,
            hidden_us=max(compute_us - rows_us, 0.0),
            micro_batches=micro_batches,
        )

    @classmethod
    def by_sizes(
        cls,
        row_bytes: float,
        weight_bytes: float,
        gradient_bytes: float,
        ranks: int,
        *,
        traffic: float,
        pass_share: float,
    ) -> CopyCosts:
        """Costs by sizes, in the time of one row: its exchanges take `traffic` of it, and bytes of copies as long.

        A copy's bytes count by their share of all ranks' links, as if copies lay evenly on them. `pass_share`: parts of
        a rank's rows that a copy is taken to need in each pass: messages and products of its own.
        """
        exchanges = 4 * row_bytes  # dispatch and combine, there and back
        return cls(
            row_us=1.0,
            each_us=traffic * weight_bytes / exchanges / ranks,
            gradient_ratio=gradient_bytes / weight_bytes,
            pass_share=pass_share,
        )


def price_us(
    rows_E: Sequence[float],
    placement: Placement,
    torus: Torus,
    costs: CopyCosts,
    others_E: Sequence[Sequence[float]] = (),
) -> float:
    """Microseconds of a window whose micro-batches have so many rows for each expert of the group.

    `others_E`: other loads that they may have, each as likely.
    """
    return _price(_whole(rows_E, others_E), placement, torus, costs)


def place(
    rows_E: Sequence[float],
    torus: Torus,
    slots: int | Literal["auto"],
    costs: CopyCosts,
    previous: Placement | None = None,
    others_E: Sequence[Sequence[float]] = (),
    *,
    has_begun: bool = False,
) -> Placement:
    """The placement of the next window, for these rows per micro-batch: never dearer than none by its own price.

    "auto" takes as many slots as pay. The previous placement stays unless another is cheaper by MARGIN, or as cheap
    with fewer copies. `others_E`: where loads move, those that may come as well. `has_begun`: the weights of the
    previous placement's copies are there, and a window waits for those of another.
    """
    loads, local = _whole(rows_E, others_E), len(rows_E) // torus.size
    most = min(MAX_AUTO_SLOTS if slots == "auto" else slots, len(rows_E) - local)
    none = Placement.without_guests(torus.size, local, 0 if slots == "auto" else slots)
    before = previous if previous is not None and _fits(previous, none, slots, most) else none
    prices = {each: _price(loads, each, torus, costs, has_begun, each == before) for each in (none, before)}
    kept = min((none, before), key=lambda placement: (prices[placement], len(placement.copies)))
    level_us = _level_us(loads, torus, costs)
    if prices[kept] <= (1 + (NEAR if others_E else MARGIN)) * level_us:  # with no transfer
        return kept
    if not _may_pay(loads, torus, most, costs, level_us, prices[kept], len(kept.copies), has_begun):
        return kept
    best, best_us = kept, prices[kept]
    for num_slots in range(1, most + 1) if slots == "auto" else [most] * (most > 0):
        for found in _candidates(loads, torus, num_slots, none.slots):
            num_copies = len(found.copies)
            least_us = level_us + _copies_us(level_us, found, torus, costs, has_begun, found == before)
            if least_us > best_us * (1 - SMALL) and num_copies >= len(best.copies):
                continue
            found_us = _price(loads, found, torus, costs, has_begun, found == before)
            is_cheaper = found_us < best_us * (1 - MARGIN * (found.slots > best.slots))
            if is_cheaper or (found_us <= best_us and num_copies < len(best.copies)):
                best, best_us = found, found_us
    is_worth_it = best_us < prices[kept] * (1 - MARGIN) or len(best.copies) < len(kept.copies)
    return best if is_worth_it else kept


def _may_pay(
    loads: Sequence[Sequence[int]],
    torus: Torus,
    slots: int,
    costs: CopyCosts,
    level_us: float,
    kept_us: float,
    num_kept: int,
    has_begun: bool,
) -> bool:
    """False where no placement at all is enough cheaper than the kept one: then none is looked for."""
    each_us = min(costs.near_us, costs.far_us)  # of the busiest link, which carries one copy at least
    row_us = costs.micro_batches * costs.row_us / PARTS / len(loads)
    lowest = [lowest_levels(rows_E, torus, slots) for rows_E in loads]
    for copies in range(slots * torus.size + 1):
        weights_us = copies * costs.each_us + each_us * (copies > 0)
        sums_us = costs.gradient_ratio * weights_us
        transfer_us = max((0.0 if has_begun else weights_us) + sums_us - costs.hidden_us, 0.0)
        copies_us = max(transfer_us, copies * costs.pass_share * level_us) + _passes_us(-(-copies // torus.size), costs)
        least_us = (row_us * sum(levels[copies] for levels in lowest) + copies_us) * (1 - ROUNDING)
        if least_us < kept_us * (1 - MARGIN) or (copies < num_kept and least_us <= kept_us):
            return True
    return False


def _fits(previous: Placement, none: Placement, slots: int | Literal["auto"], most: int) -> bool:
    is_alike = (previous.ranks, previous.local_experts) == (none.ranks, none.local_experts)
    return is_alike and (previous.slots <= most if slots == "auto" else previous.slots == none.slots)


def _whole(rows_E: Sequence[float], others_E: Sequence[Sequence[float]]) -> list[list[int]]:
    return [[round(rows * PARTS) for rows in each] for each in (rows_E, *others_E)]


def _candidates(loads: Sequence[Sequence[int]], torus: Torus, num_slots: int, width: int) -> list[Placement]:
    """Placements with up to so many copies per rank, each once."""
    local = len(loads[0]) // torus.size
    proposed = levelled(loads[0], torus, num_slots) if len(loads) == 1 else spread(loads[0], torus, num_slots)
    different = dict.fromkeys(tuple(map(tuple, guests)) for guests in proposed)
    return [_placement(guests, local, max(width, max(map(len, guests)))) for guests in different]


def _placement(guests: Sequence[Sequence[int]], local: int, slots: int) -> Placement:
    return Placement(len(guests), local, slots, tuple((*own, *[None] * (slots - len(own))) for own in guests))


def _price(
    loads: Sequence[Sequence[int]],
    placement: Placement,
    torus: Torus,
    costs: CopyCosts,
    has_begun: bool = False,
    is_there: bool = False,
) -> float:
    fullest = sum(max(levelled_rows(rows_E, placement, SLACK)) for rows_E in loads) / len(loads)
    rows_us = costs.micro_batches * costs.row_us * fullest / PARTS
    return rows_us + _copies_us(_level_us(loads, torus, costs), placement, torus, costs, has_begun, is_there)


def _level_us(loads: Sequence[Sequence[int]], torus: Torus, costs: CopyCosts) -> float:
    """Time of the rows of a rank where all have as many."""
    return costs.micro_batches * costs.row_us * sum(map(sum, loads)) / len(loads) / PARTS / torus.size


def _copies_us(
    level_us: float, placement: Placement, torus: Torus, costs: CopyCosts, has_begun: bool, is_there: bool
) -> float:
    weights_us, sums_us = _transfers_us(placement, torus, costs)
    if has_begun:  # nothing hides the weights that are sent now
        transfer_us = (0.0 if is_there else weights_us) + max(sums_us - costs.hidden_us, 0.0)
    else:
        transfer_us = max(weights_us + sums_us - costs.hidden_us, 0.0)
    most = max(placement.slots - guests.count(None) for guests in placement.guests_RS)
    return max(transfer_us, len(placement.copies) * costs.pass_share * level_us) + _passes_us(most, costs)


def _passes_us(guests: int, costs: CopyCosts) -> float:
    """Time that the guests of one rank take beside their rows."""
    return guests * costs.micro_batches * costs.pass_us


def levelled_rows(rows_E: Sequence[int], placement: Placement, parts: int = 0) -> list[int]:
    """Rows of each rank where every expert's rows are levelled over its hosts, as `level` has it."""
    load_R = home_rows(rows_E, placement)
    for expert, quotas in level(rows_E, placement.hosts_E, load_R, parts).items():
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


def _transfers_us(placement: Placement, torus: Torus, costs: CopyCosts) -> tuple[float, float]:
    """Time of all copies' weights, and of the rounds in which their gradient sums go home."""
    copies = {(expert, rank): 1 for expert, rank, _ in placement.copies}
    shared_us = len(copies) * costs.each_us
    if not costs.near_us and not costs.far_us:
        return shared_us, costs.gradient_ratio * shared_us
    weights = [(placement.home(expert), rank) for expert, rank in copies]
    rounds = [[(move.source, move.target) for move in moves] for moves in rounds_home(copies, placement.home)]
    sums_us = sum(_busiest_us(pairs, torus, costs) for pairs in rounds)
    return shared_us + _busiest_us(weights, torus, costs), costs.gradient_ratio * (shared_us + sums_us)


def _busiest_us(pairs: Sequence[tuple[int, int]], torus: Torus, costs: CopyCosts) -> float:
    """Time of one expert's weights from source to target of each pair, on the link that carries most of them."""
    time_of: dict[tuple[str, bool, int], float] = {}
    for source, target in pairs:
        is_far = source // torus.node_size != target // torus.node_size
        for end in (("sends", is_far, source), ("receives", is_far, target)):
            time_of[end] = time_of.get(end, 0.0) + (costs.far_us if is_far else costs.near_us)
    return max(time_of.values(), default=0.0)
