"""Verdicts on the links between ranks, from what the ranks measured: pure functions of an Outcome.

Two ranks are near where the torus of their expert group has them on one node, far otherwise. The schedule computes near
rows under far transfers, so near links should be at least as fast as far ones; they never fail where they are not.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from ds_moe_ep.config.topology import Torus, even_share, torus_of
from ds_moe_ep.doctor.links.outcome import LinksOutcome, Presence, TriedLink
from ds_moe_ep.doctor.verdicts import Verdict
from ds_moe_ep.health.secondary_failures import is_secondary_message
from ds_moe_ep.records.quantity import counted, number

_verdict = partial(Verdict, "links")

Reach = Literal["near", "far"]
SLOW = 3.0  # a pair this many times slower than the median of its class stands out
ALIKE = 1.25  # near and far within this factor are the same


def torus_of_hosts(group: Sequence[int], node_size: int, hosts: Mapping[int, str]) -> Torus:
    """The torus that the layer would use for `group`: by node_size, or by host names where that is 0."""
    if node_size:
        return torus_of(group, node_size)
    share = even_share([hosts[rank] for rank in group])
    return Torus(len(group) // share, share)


def reaches(groups: Sequence[Sequence[int]], node_size: int, hosts: Mapping[int, str]) -> dict[tuple[int, int], Reach]:
    """Near or far, for each pair of ranks of one expert group; pairs as (lower, higher)."""
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
    shares_cores = len(set(hosts.values())) == 1 and outcome.backend == "gloo"
    classes = reaches(groups, node_size, hosts)
    near, far = ([link for link in outcome.links if classes[link.low, link.high] == reach] for reach in ("near", "far"))
    for name, links in (("near links", near), ("far links", far)):
        if links:
            verdicts.append(_verdict(name, "ok", _told(links)))
            verdicts += [] if shares_cores else judge_slow_pairs(name, links)
    verdicts += judge_shared_host(near, far) if shares_cores else judge_topology(near, far)
    return verdicts


def judge_ranks(outcome: LinksOutcome) -> Iterator[Verdict]:
    """Verdicts on ranks that did not come up, measure, or end."""
    size, missing = outcome.world_size, outcome.missing
    if missing:
        found = f"{_ranks(missing)} of {size} did not come up in {number(outcome.waited_s, 0)} s"
        reasons = [f"rank {rank}: {outcome.failed[rank]}" for rank in missing if rank in outcome.failed]
        fix = "look at what that rank's process says, and whether its host reaches MASTER_ADDR and MASTER_PORT"
        yield _verdict("ranks", "problem", "; ".join([found, *reasons]), fix)
        return
    where = counted(len({presence.host for presence in outcome.up.values()}), "host")
    yield _verdict(
        "ranks", "ok", f"{size} of {size} came up in {number(outcome.waited_s, 1)} s on {where}, {outcome.backend}"
    )
    yield from judge_devices(outcome.up)
    if outcome.failed:
        rank, error = min(outcome.failed.items(), key=lambda item: is_secondary_message(item[1]))
        found = f"rank {rank} failed: {error}"
        if outcome.silent and is_secondary_message(error):
            found = f"{_ranks(outcome.silent)} ended or stopped without a word; {found}"
        fix = "look at what these processes say; see the environment above: interfaces, adapters, one GPU per rank"
        yield _verdict("transfers", "problem", found, fix)
    elif outcome.silent:
        where = f"between ranks {outcome.hung[0]} and {outcome.hung[1]}" if outcome.hung else "at the end"
        found = f"{_ranks(outcome.silent)} did not end in time: the trial hangs {where}, or is very slow there"
        yield _verdict("transfers", "problem", found, "look at these two processes; try again with more --seconds")


def judge_devices(up: Mapping[int, Presence]) -> Iterator[Verdict]:
    """A warning where some ranks have a GPU of their own and others have none."""
    without = [rank for rank, presence in up.items() if not presence.has_gpu]
    if 0 < len(without) < len(up):
        found = f"{_ranks(without)} of {len(up)} have no GPU of their own, so gloo was tried instead of NCCL"
        yield _verdict("devices", "warning", found, "start as many ranks on each host as it has GPUs (here: --ranks)")


def judge_hosts(hosts: Mapping[int, str], node_size: int) -> Iterator[Verdict]:
    """The ranks' hosts against node_size."""
    counts = Counter(hosts.values())
    listed = ", ".join(f"{name} {number}" for name, number in list(counts.items())[:8])
    if node_size == 0:
        if even_share(list(hosts.values())) == 1 and max(counts.values()) > 1:
            found = f"uneven or scattered ({listed}): every rank counts as a node of its own, so no link as near"
            fix = "start as many ranks on each host, host by host (mpirun --map-by slot), or set moe_ep.node_size"
            yield _verdict("hosts", "warning", found, fix)
        else:
            yield _verdict("hosts", "ok", f"ranks by host: {listed}; moe_ep.node_size=0 counts them so")
        return
    hosts_of_node: dict[int, set[str]] = {}
    for rank, host in hosts.items():
        hosts_of_node.setdefault(rank // node_size, set()).add(host)
    if spread := [node for node, its in hosts_of_node.items() if len(its) > 1]:
        first = min(spread) * node_size
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


def judge_releases(of_ranks: Mapping[int, Mapping[str, str | None]]) -> Iterator[Verdict]:
    """Releases that differ between ranks."""
    for name, found in _differences(of_ranks):
        yield _verdict("releases", "problem", found, f"install the same {name} on every host")


def judge_variables(of_ranks: Mapping[int, Mapping[str, str | None]]) -> Iterator[Verdict]:
    """Variables that differ between ranks: launchers carry only some of them to other nodes."""
    for name, found in _differences(of_ranks):
        fix = f"give every node a line {name}=... (deepspeed: DS_ENV_FILE=examples/.deepspeed_env; mpirun -x {name})"
        yield _verdict("variables", "warning", found, fix)


def _differences(of_ranks: Mapping[int, Mapping[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Names whose values differ from rank 0's, and how."""
    for name in sorted({name for values in of_ranks.values() for name in values}):
        first = of_ranks[0].get(name)
        odd = [rank for rank, values in of_ranks.items() if values.get(name) != first]
        if odd:
            theirs = of_ranks[odd[0]].get(name)
            yield name, f"{name} is {first or 'not there'} on rank 0, {theirs or 'not there'} on {_ranks(odd)}"


def _told(links: Sequence[TriedLink]) -> str:
    """The median of a class of links, and its range."""
    latency, rate = _medians(links)
    rates = sorted(link.gb_per_s for link in links)
    found = f"{counted(len(links), 'pair')}: {number(latency, 0)} us for a byte, {_rate(rate)} for large messages"
    return found if len(links) == 1 else f"{found} ({_rate(rates[0])} to {_rate(rates[-1])})"


def judge_slow_pairs(name: str, links: Sequence[TriedLink]) -> Iterator[Verdict]:
    """The pairs that are much slower than the others of their class."""
    latency, rate = _medians(links)
    slow = [link for link in links if link.gb_per_s * SLOW < rate or link.latency_us > SLOW * latency]
    if not slow:
        return
    worst = min(slow, key=lambda link: link.gb_per_s)
    named = ", ".join(link.name for link in slow[:6]) + (f" and {len(slow) - 6} more" if len(slow) > 6 else "")
    at_worst = f"the worst {number(worst.latency_us, 0)} us, {_rate(worst.gb_per_s)}"
    found = f"much slower than the others: ranks {named} ({at_worst})"
    ranks = Counter(rank for link in slow for rank in (link.low, link.high))
    common = [rank for rank, times in ranks.items() if len(slow) > 1 and times == len(slow)]
    fix = f"look at rank {common[0]}'s host and adapter" if common else "look at the cable, adapter or load of these"
    yield _verdict(name, "warning", found, f"{fix}; all ranks wait for the slowest pair")


def judge_shared_host(near: Sequence[TriedLink], far: Sequence[TriedLink]) -> Iterator[Verdict]:
    """The one thing to say of links between processes that share a host: its scheduler sets their times.

    Links that were shaped keep their classes apart all the same, by their rates.
    """
    if near and far and _medians(near)[1] >= ALIKE * _medians(far)[1]:
        yield _verdict("topology", "ok", f"{_compared(near, far)}, as the topology says")
    if near or far:
        found = "all ranks share this host and its cores, whose load sets their times: no pair can be judged here"
        yield _verdict(
            "pairs", "note", found, "try the job's hosts: deepspeed --hostfile ... --module ds_moe_ep doctor"
        )


def judge_topology(near: Sequence[TriedLink], far: Sequence[TriedLink]) -> Iterator[Verdict]:
    """Near links against far ones: the schedule takes near ones to be faster."""
    if not near or not far:
        if near or far:
            yield _verdict("topology", "note", f"every link that was tried is {'near' if near else 'far'}")
        return
    near_rate, far_rate, found = _medians(near)[1], _medians(far)[1], _compared(near, far)
    if near_rate >= far_rate * ALIKE:
        yield _verdict("topology", "ok", f"{found}, as the topology says")
    elif near_rate * ALIKE < far_rate:
        fix = "see whether near ranks meet by NVLink (nvidia-smi topo -m), and whether moe_ep.node_size is right"
        yield _verdict("topology", "warning", f"{found}: the topology says that near is faster", fix)
    else:
        yield _verdict("topology", "note", f"{found}: alike, so groups of peers may gain little over chunks")


def _compared(near: Sequence[TriedLink], far: Sequence[TriedLink]) -> str:
    (near_us, near_rate), (far_us, far_rate) = _medians(near), _medians(far)
    rates, latencies = number(near_rate / far_rate), number(near_us / far_us)
    return f"near links have {rates} times the rate and {latencies} the latency of far ones"


def _medians(links: Sequence[TriedLink]) -> tuple[float, float]:
    latency = statistics.median(link.latency_us for link in links)
    return latency, statistics.median(link.gb_per_s for link in links)


def _rate(gb_per_s: float) -> str:
    return f"{number(gb_per_s)} GB/s" if gb_per_s >= 0.1 else f"{number(1000 * gb_per_s)} MB/s"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
