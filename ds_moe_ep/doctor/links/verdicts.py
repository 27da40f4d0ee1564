"""Verdicts on the links between ranks, from what the ranks measured: pure functions of an Outcome.

Two ranks are near where the torus of their expert group has them on one node, far otherwise. The schedule computes near
rows under far transfers, so near links should be at least as fast as far ones; they never fail where they are not.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_moe_ep.config.topology import Torus, even_share, torus_of
from ds_moe_ep.doctor.verdicts import Status, Verdict

Reach = Literal["near", "far"]
SLOW = 3.0  # a pair this many times slower than the median of its class stands out
ECHOES = ("Connection closed", "Connection reset", "Broken pipe", "remote peer", "remote worker", "imed out")
ALIKE = 1.25  # near and far within this factor are the same


@dataclass(frozen=True)
class TriedLink:
    """What one pair of ranks measured; `low` is the lower rank."""

    low: int
    high: int
    latency_us: float  # half the median round trip of one byte
    gb_per_s: float  # one way, of a large message

    @property
    def name(self) -> str:
        return f"{self.low}-{self.high}"


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What a rank says of itself when it is up."""

    host: str = ""
    has_gpu: bool = False
    versions: Mapping[str, str | None] = field(default_factory=dict)
    variables: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LinksOutcome:
    """All that is known after the ranks have measured, or have failed to."""

    world_size: int
    backend: str = "gloo"
    up: Mapping[int, Presence] = field(default_factory=dict)
    waited_s: float = 0.0  # until the last of them was up, or until nobody waited longer
    links: tuple[TriedLink, ...] = ()
    failed: Mapping[int, str] = field(default_factory=dict)
    silent: tuple[int, ...] = ()  # ranks that were up and did not end in time
    hung: tuple[int, int] | None = None  # the pair at which they stand: pairs are tried one after the other
    stuck: bool = False  # this process holds a transfer that does not end

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.up]

    def to_json(self) -> str:
        """The outcome as text, for the process that prints it."""
        values = {**vars(self), "up": {rank: vars(presence) for rank, presence in self.up.items()}}
        return json.dumps({**values, "links": [vars(link) for link in self.links]})


def outcome_from(text: str) -> LinksOutcome:
    """The outcome of `to_json`."""
    values: dict[str, Any] = json.loads(text)
    values["up"] = {int(rank): Presence(**presence) for rank, presence in values["up"].items()}
    values["failed"] = {int(rank): error for rank, error in values["failed"].items()}
    values["links"] = tuple(TriedLink(**link) for link in values["links"])
    values["hung"] = tuple(values["hung"]) if values["hung"] else None
    return LinksOutcome(**{**values, "silent": tuple(values["silent"])})


def torus_of_hosts(group: Sequence[int], node_size: int, hosts: Mapping[int, str]) -> Torus:
    """The torus that the layer would use for `group`: by node_size, or by host names where that is 0."""
    if node_size:
        return torus_of(group, node_size)
    share = even_share([hosts[rank] for rank in group])
    return Torus(len(group) // share, share)


def reaches(groups: Sequence[Sequence[int]], node_size: int, hosts: Mapping[int, str]) -> dict[tuple[int, int], Reach]:
    """Whether each pair of ranks of one expert group is near or far; pairs as (lower, higher)."""
    found: dict[tuple[int, int], Reach] = {}
    for group in groups:
        side = torus_of_hosts(group, node_size, hosts).node_size
        for i, one in enumerate(group):
            for j, other in enumerate(group[i + 1 :], start=i + 1):
                found[min(one, other), max(one, other)] = "near" if i // side == j // side else "far"
    return found


def pairs_to_try(classes: Mapping[tuple[int, int], Reach], most: int) -> list[tuple[int, int]]:
    """All pairs, or `most` of them spread evenly over each class where there are more."""
    chosen: list[tuple[int, int]] = []
    for reach in ("near", "far"):
        pairs = sorted(pair for pair, its in classes.items() if its == reach)
        share = max(1, most * len(pairs) // max(1, len(classes)))
        step = max(1.0, len(pairs) / share)
        chosen += [pairs[int(index * step)] for index in range(min(share, len(pairs)))]
    return chosen


def judge_links(outcome: LinksOutcome, groups: Sequence[Sequence[int]], node_size: int) -> list[Verdict]:
    """Verdicts on ranks, hosts, and each class of links."""
    verdicts = list(judge_ranks(outcome))
    if outcome.missing:
        return verdicts
    hosts = {rank: presence.host for rank, presence in outcome.up.items()}
    verdicts += judge_hosts(hosts, node_size)
    verdicts += judge_releases({rank: presence.versions for rank, presence in outcome.up.items()})
    verdicts += judge_variables({rank: presence.variables for rank, presence in outcome.up.items()})
    one_host = len(set(hosts.values())) == 1
    classes = reaches(groups, node_size, hosts)
    near, far = ([link for link in outcome.links if classes[link.low, link.high] == reach] for reach in ("near", "far"))
    for name, links in (("near links", near), ("far links", far)):
        if links:
            verdicts += judge_class(name, links, is_wire=not one_host or outcome.backend == "nccl")
    verdicts += judge_topology(near, far, one_host=one_host)
    return verdicts


def judge_ranks(outcome: LinksOutcome) -> Iterator[Verdict]:
    """Whether every rank came up, measured, and ended."""
    size, missing = outcome.world_size, outcome.missing
    if missing:
        found = f"{_ranks(missing)} of {size} did not come up in {outcome.waited_s:.0f} s"
        reasons = [f"rank {rank}: {outcome.failed[rank]}" for rank in missing if rank in outcome.failed]
        way_out = "look at what that rank's process says, and whether its host reaches MASTER_ADDR and MASTER_PORT"
        yield _verdict("ranks", "problem", "; ".join([found, *reasons]), way_out)
        return
    hosts = len({presence.host for presence in outcome.up.values()})
    where = "1 host" if hosts == 1 else f"{hosts} hosts"
    yield _verdict("ranks", "ok", f"{size} of {size} came up in {outcome.waited_s:.1f} s on {where}, {outcome.backend}")
    yield from judge_devices(outcome.up)
    if outcome.failed:
        rank, error = min(outcome.failed.items(), key=lambda item: _is_echo(item[1]))
        found = f"rank {rank} failed: {error}"
        if outcome.silent and _is_echo(error):
            found = f"{_ranks(outcome.silent)} ended or stopped without a word; {found}"
        way_out = "look at what these processes say; see the environment above: interfaces, adapters, one GPU a rank"
        yield _verdict("transfers", "problem", found, way_out)
    elif outcome.silent:
        where = f"between ranks {outcome.hung[0]} and {outcome.hung[1]}" if outcome.hung else "at the end"
        found = f"{_ranks(outcome.silent)} did not end in time: the trial hangs {where}, or is very slow there"
        yield _verdict("transfers", "problem", found, "look at these two processes; try again with more --seconds")


def judge_devices(up: Mapping[int, Presence]) -> Iterator[Verdict]:
    """Whether all ranks have a GPU of their own, or none has."""
    without = [rank for rank, presence in up.items() if not presence.has_gpu]
    if 0 < len(without) < len(up):
        found = f"{_ranks(without)} of {len(up)} have no GPU of their own, so gloo was tried instead of NCCL"
        yield _verdict("devices", "warning", found, "start as many ranks on each host as it has GPUs (here: --ranks)")


def _is_echo(error: str) -> bool:
    """Whether an error only tells that another rank has gone."""
    return any(sign in error for sign in ECHOES)


def judge_hosts(hosts: Mapping[int, str], node_size: int) -> Iterator[Verdict]:
    """Whether ranks lie on hosts as node_size says."""
    counts = Counter(hosts.values())
    listed = ", ".join(f"{name} {number}" for name, number in list(counts.items())[:8])
    if node_size == 0:
        if even_share(list(hosts.values())) == 1 and max(counts.values()) > 1:
            found = f"uneven or scattered ({listed}): every rank counts as a node of its own, so no link as near"
            way_out = "start as many ranks on each host, host by host (mpirun --map-by slot), or set moe_ep.node_size"
            yield _verdict("hosts", "warning", found, way_out)
        else:
            yield _verdict("hosts", "ok", f"ranks by host: {listed}; moe_ep.node_size=0 counts them so")
        return
    spread = [node for node in range(-(-len(hosts) // node_size)) if len(set(_members(hosts, node, node_size))) > 1]
    if spread:
        first = spread[0] * node_size
        found = f"moe_ep.node_size={node_size}, but ranks {first} to {first + node_size - 1} are on several hosts"
        yield _verdict(
            "hosts", "warning", found, "set moe_ep.node_size to the ranks of one host, or to 0 to count them"
        )
    elif len(hosts) > node_size and len(counts) == 1:
        found = f"all {len(hosts)} ranks are on one host: moe_ep.node_size={node_size} makes nodes that are nominal"
        yield _verdict("hosts", "note", found)
    elif max(counts.values()) > node_size:
        found = (
            f"moe_ep.node_size={node_size}, and a host has {max(counts.values())} ranks: some near links count as far"
        )
        yield _verdict("hosts", "note", found, f"set moe_ep.node_size to {max(counts.values())}, or to 0")
    else:
        yield _verdict("hosts", "ok", f"ranks by host: {listed}; moe_ep.node_size={node_size} fits")


def _members(hosts: Mapping[int, str], node: int, node_size: int) -> list[str]:
    return [host for rank, host in hosts.items() if rank // node_size == node]


def judge_releases(of_ranks: Mapping[int, Mapping[str, str | None]]) -> Iterator[Verdict]:
    """Whether every rank runs the same releases."""
    for name, found in _differences(of_ranks):
        yield _verdict("releases", "problem", found, f"install the same {name} on every host")


def judge_variables(of_ranks: Mapping[int, Mapping[str, str | None]]) -> Iterator[Verdict]:
    """Whether every rank has the same variables: launchers carry only some of them to other nodes."""
    for name, found in _differences(of_ranks):
        way_out = (
            f"give every node a line {name}=... (deepspeed: DS_ENV_FILE=examples/.deepspeed_env; mpirun -x {name})"
        )
        yield _verdict("variables", "warning", found, way_out)


def _differences(of_ranks: Mapping[int, Mapping[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Names whose values differ from rank 0's, and how."""
    for name in sorted({name for values in of_ranks.values() for name in values}):
        first = of_ranks[0].get(name)
        odd = [rank for rank, values in of_ranks.items() if values.get(name) != first]
        if odd:
            theirs = of_ranks[odd[0]].get(name)
            yield name, f"{name} is {first or 'not there'} on rank 0, {theirs or 'not there'} on {_ranks(odd)}"


def judge_class(name: str, links: Sequence[TriedLink], *, is_wire: bool) -> Iterator[Verdict]:
    """The links of one class, and the pairs that are much slower than the others.

    Between processes of one machine (no wire) latency is the scheduler's, and tells nothing of a pair.
    """
    latency, rate = _medians(links)
    rates = sorted(link.gb_per_s for link in links)
    number = "1 pair" if len(links) == 1 else f"{len(links)} pairs"
    found = f"{number}: {latency:.0f} us for a byte, {_rate(rate)} for large messages"
    if len(links) > 1:
        found += f" ({_rate(rates[0])} to {_rate(rates[-1])})"
    slow = [link for link in links if link.gb_per_s * SLOW < rate or (is_wire and link.latency_us > SLOW * latency)]
    yield _verdict(name, "ok", found)
    if not slow:
        return
    worst = min(slow, key=lambda link: link.gb_per_s)
    named = ", ".join(link.name for link in slow[:6]) + (f" and {len(slow) - 6} more" if len(slow) > 6 else "")
    found = f"much slower than the others: ranks {named} (the worst {worst.latency_us:.0f} us, {_rate(worst.gb_per_s)})"
    ranks = Counter(rank for link in slow for rank in (link.low, link.high))
    common = [rank for rank, number in ranks.items() if len(slow) > 1 and number == len(slow)]
    way_out = (
        f"look at rank {common[0]}'s host and adapter" if common else "look at the cable, adapter or load of these"
    )
    yield _verdict(name, "warning", found, f"{way_out}; all ranks wait for the slowest pair")


def judge_topology(near: Sequence[TriedLink], far: Sequence[TriedLink], *, one_host: bool) -> Iterator[Verdict]:
    """Whether near links are faster than far ones, as the schedule takes them to be."""
    if not near and not far:
        return
    if not near or not far:
        only = "near" if near else "far"
        found = f"every link that was tried is {only}"
        if near and one_host:
            found += ": far links show in the job itself (deepspeed --hostfile ... --module ds_moe_ep doctor)"
        yield _verdict("topology", "note", found)
        return
    (near_us, near_rate), (far_us, far_rate) = _medians(near), _medians(far)
    found = (
        f"near links have {near_rate / far_rate:.2g} times the rate and {near_us / far_us:.2g} the latency of far ones"
    )
    if near_rate >= far_rate * ALIKE:
        yield _verdict("topology", "ok", f"{found}, as the topology says")
    elif one_host:
        yield _verdict("topology", "note", f"{found}: on one host both are the same wire, whatever node_size says")
    elif near_rate * ALIKE < far_rate:
        way_out = "see whether near ranks meet by NVLink (nvidia-smi topo -m), and whether moe_ep.node_size is right"
        yield _verdict("topology", "warning", f"{found}: the topology says that near is faster", way_out)
    else:
        yield _verdict("topology", "note", f"{found}: alike, so groups of peers may gain little over chunks")


def _medians(links: Sequence[TriedLink]) -> tuple[float, float]:
    latency = statistics.median(link.latency_us for link in links)
    return latency, statistics.median(link.gb_per_s for link in links)


def _rate(gb_per_s: float) -> str:
    return f"{gb_per_s:.3g} GB/s" if gb_per_s >= 0.1 else f"{1000 * gb_per_s:.3g} MB/s"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _verdict(name: str, status: Status, found: str, way_out: str = "") -> Verdict:
    return Verdict("links", name, status, found, way_out)
