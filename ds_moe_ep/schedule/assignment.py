"""Which host computes each source's rows of an expert that has copies; per pass, the same on every rank.

1. `levelling.level` says how many of an expert's rows each host takes, so that the ranks' totals are level.
2. A source keeps rows on its own rank, then on its node, until a host has from its node what an even spread would send
   it; what is left is shared out in the proportion of the places that are left. So every message has about its share:
   where a rank's near rows are many more than its peers', those wait for the far rows that it sends behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.levelling import level
from ds_moe_ep.schedule.placement import Placement, home_rows

Rows = tuple[tuple[int, ...], ...]

SLACK = 256  # of the mean rows of a rank, one part: what is that level is level, and takes no more sweeps


@dataclass(frozen=True)
class Assignment:
    """Rows of one pass by source R, expert E and host H.

    `split`: for each expert that has copies, rows by source and by host in the order of `placement.hosts(expert)`.
    All other rows are computed at home.
    """

    placement: Placement
    rows_RE: Sequence[Sequence[int]]
    split: Mapping[int, Rows]

    def sent_PL(self, rank: int) -> Rows:
        """Rows that a rank sends, by peer and by place there: the peer's own experts, and behind them its slots."""
        return tuple(self._to(rank, peer) for peer in range(self.placement.ranks))

    def received_PL(self, rank: int) -> Rows:
        """Rows that a rank receives, by source and by place: its own experts, and behind them its slots."""
        return tuple(self._to(source, rank) for source in range(self.placement.ranks))

    def parts(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """(expert, host, rows) of all rows of a source, in the order of experts, and of each expert's hosts.

        A source's rows of an expert go to its hosts in this order, so each part is a span of them.
        """
        for expert, rows in enumerate(self.rows_RE[rank]):
            if expert not in self.split:
                yield expert, self.placement.home(expert), rows
                continue
            hosts = self.placement.hosts(expert)
            yield from ((expert, host, part) for host, part in zip(hosts, self.split[expert][rank], strict=True))

    def rows_R(self) -> tuple[int, ...]:
        """Rows that each rank computes."""
        load_R = home_rows([sum(rows) for rows in zip(*self.rows_RE, strict=True)], self.placement)
        for expert, rows_RH in self.split.items():
            for host, rows in zip(self.placement.hosts(expert), map(sum, zip(*rows_RH, strict=True)), strict=True):
                load_R[host] += rows
        return tuple(load_R)

    def _to(self, source: int, host: int) -> tuple[int, ...]:
        placement, rows_E = self.placement, self.rows_RE[source]
        first = host * placement.local_experts
        own = [
            self.split[expert][source][0] if expert in self.split else rows_E[expert]
            for expert in range(first, first + placement.local_experts)
        ]
        guests = [
            0 if guest is None else self.split[guest][source][placement.hosts(guest).index(host)]
            for guest in placement.guests_RS[host]
        ]
        return (*own, *guests)


def assign(rows_RE: Sequence[Sequence[int]], placement: Placement, torus: Torus) -> Assignment:
    """The hosts of every source's rows: exact sums, level totals, near hosts first. Local, and equal on all ranks."""
    if not placement.hosts_E:
        return Assignment(placement, rows_RE, {})
    rows_E = [sum(rows) for rows in zip(*rows_RE, strict=True)]
    quotas = level(rows_E, placement.hosts_E, home_rows(rows_E, placement), SLACK)
    split = {
        expert: _split([rows[expert] for rows in rows_RE], placement.hosts_E[expert], quotas[expert], torus)
        for expert in placement.hosts_E
    }
    return Assignment(placement, rows_RE, split)


def _split(rows_R: Sequence[int], hosts: Sequence[int], quotas: Sequence[int], torus: Torus) -> Rows:
    """Rows of one expert by source and host: sums over hosts are `rows_R`, sums over sources are `quotas`."""
    left_R, left_H = list(rows_R), list(quotas)
    near_H = [quota * torus.node_size // torus.size for quota in quotas]  # places for rows of the host's node
    split_RH = [[0] * len(hosts) for _ in rows_R]

    def give_near(source: int, index: int) -> None:
        rows = min(left_R[source], near_H[index])
        near_H[index] -= rows
        give(source, index, rows)

    def give(source: int, index: int, rows: int) -> None:
        split_RH[source][index] += rows
        left_R[source] -= rows
        left_H[index] -= rows

    for index, host in enumerate(hosts):
        give_near(host, index)
    for index, host in enumerate(hosts):
        node = host // torus.node_size
        for source in range(node * torus.node_size, (node + 1) * torus.node_size):
            give_near(source, index)
    total = sum(left_R)
    for source, rows in enumerate(left_R):
        if not rows:
            continue
        places = reached = 0
        for index, free in enumerate(list(left_H)):
            places += free
            share = places * rows // total - reached  # at most `free`, and all shares together are `rows`
            reached += share
            give(source, index, share)
        total -= rows
    return tuple(map(tuple, split_RH))
