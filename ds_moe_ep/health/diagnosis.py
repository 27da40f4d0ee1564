"""Diagnosis of the job from all ranks' heartbeats: who is unhealthy, what failed first, who is where.

Pure functions of one view.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.health.heartbeat import Fault, Heartbeat
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.store import Seen
from ds_moe_ep.records.quantity import number

MOST_NAMED = 4  # ranks in trouble that one error names


@dataclass(frozen=True)
class View:
    """All that rank `own` knows of the ranks: heartbeats, processes, since when the store is silent."""

    own: int
    seen: Mapping[int, Seen]
    statuses: Mapping[int, ProcessStatus]
    store_silent_s: float
    silence_s: float  # who gives no heartbeat for so long is unhealthy

    def others(self) -> list[Seen]:
        return [self.seen[rank] for rank in sorted(self.seen) if rank != self.own]


def is_gone(view: View, rank: int) -> bool:
    """True where a rank's process has ended."""
    seen = view.seen.get(rank)
    return view.statuses.get(rank) is ProcessStatus.GONE or (seen is not None and seen.heartbeat.has_left)


def is_silent(view: View, rank: int) -> bool:
    """True where a rank whose process may live gives no heartbeat."""
    seen = view.seen.get(rank)
    if seen is None or is_gone(view, rank):
        return False
    return view.statuses.get(rank) is ProcessStatus.STOPPED or seen.silent_s > view.silence_s


def unhealthy(view: View) -> dict[int, str]:
    """The state of each rank that is gone or silent, in words; not of this rank, nor of one that told of a fault."""
    wrong = {}
    for seen in view.others():
        heartbeat = seen.heartbeat
        if is_silent(view, heartbeat.rank):
            is_stopped = view.statuses.get(heartbeat.rank) is ProcessStatus.STOPPED
            state = "is stopped" if is_stopped else f"has given no sign of life for {number(seen.silent_s, 0)} s"
        elif is_gone(view, heartbeat.rank) and heartbeat.fault is None:
            state = "has ended" if heartbeat.has_left else "is gone"
        else:
            continue
        wrong[heartbeat.rank] = f"{named(heartbeat)} {state}, last seen {whereabouts(heartbeat)}"
    return wrong


def first_fault(
    view: View, is_secondary: bool = False, among: Collection[int] | None = None
) -> tuple[int, Fault] | None:
    """The first fault that any rank told of, or one of these, and the rank. Secondary ones only tell of another's."""
    faults = [
        (s.heartbeat.fault.at_s, s.heartbeat.rank, s.heartbeat.fault)
        for s in view.others()
        if s.heartbeat.fault is not None and (among is None or s.heartbeat.rank in among)
    ]
    found = sorted(
        ((at_s, rank, fault) for at_s, rank, fault in faults if fault.is_secondary == is_secondary), key=lambda f: f[:2]
    )
    return (found[0][1], found[0][2]) if found else None


def failed_ranks(view: View, ranks: Iterable[int]) -> list[int]:
    """Those of the ranks that are gone or silent, or told of a fault of their own."""
    wrong = unhealthy(view)
    faults = {rank: seen.heartbeat.fault for rank, seen in view.seen.items()}
    return [
        rank for rank in ranks if rank in wrong or ((fault := faults.get(rank)) is not None and not fault.is_secondary)
    ]


def is_clear(view: View, suspects: Iterable[int]) -> bool:
    """True where it is known why `suspects` do not answer, or nobody can tell.

    A process that has closed its connections is not gone for a moment yet. So the end of another rank, which may be of
    another group, tells nothing of suspects of which none is known to be unhealthy or to have failed.
    """
    if view.store_silent_s > view.silence_s:
        return True
    wrong = unhealthy(view)
    if not wrong and first_fault(view) is None:
        return False
    return any(rank in wrong or (rank in view.seen and view.seen[rank].heartbeat.fault) for rank in suspects)


def explain(view: View, suspects: Iterable[int]) -> str:
    """The reason why `suspects` did not answer: who is unhealthy and what failed first, or where they are."""
    suspects, wrong = set(suspects), unhealthy(view)
    # Those that were silent first: where one failed, more may have ended for it since than are named. Behind the very
    # first the suspects: another one may have failed for a reason of its own.
    by_silence = sorted(wrong, key=lambda rank: -view.seen[rank].silent_s)
    first = sorted(sorted(by_silence, key=lambda rank: rank != by_silence[0] and rank not in suspects)[:MOST_NAMED])
    parts = [wrong[rank] for rank in first]
    if len(wrong) > MOST_NAMED:
        parts.append(f"{len(wrong) - MOST_NAMED} more ranks are in trouble")
    if view.store_silent_s > view.silence_s:
        servers = [named(seen.heartbeat) for seen in view.others() if seen.heartbeat.serves_store]
        parts.append(f"the ranks' store{f', on {servers[0]},' if servers else ''} does not answer")
    root = first_fault(view)
    if root is not None:
        parts.append(f"first error: rank {root[0]}: {root[1]}")
        own = first_fault(view, among=suspects)
        if own is not None and root[0] not in suspects:
            parts.append(f"rank {own[0]} failed too: {own[1]}")
    if not parts:
        places = spread(view, suspects)
        secondary = first_fault(view, is_secondary=True)
        parts = [places] if places else []
        parts += [f"first error: rank {secondary[0]}: {secondary[1]}"] if secondary is not None else []
    return "; ".join(parts)


def spread(view: View, ranks: Iterable[int]) -> str:
    """Where each of the ranks is, those at one place together; ranks without a heartbeat are left out."""
    at: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank in sorted(ranks):
        if rank in view.seen:
            heartbeat = view.seen[rank].heartbeat
            waits_for = tuple(
                other for other in heartbeat.waits_for if other not in ranks or len(heartbeat.waits_for) == 1
            )
            at.setdefault((whereabouts(heartbeat), waits_for), []).append(rank)
    return "; ".join(
        f"{ranks_named(members)} {'is' if len(members) == 1 else 'are'} {place}"
        + (f", waiting for {ranks_named(waits_for)}" if waits_for else "")
        for (place, waits_for), members in at.items()
    )


def is_deadlocked(view: View, own: Heartbeat, least_s: float) -> bool:
    """True where every rank that lives waits for others, in more than one place, and none has moved for so long.

    Ranks in one place may be in a collective that is slow; a rank that waits for none may come yet.
    """
    heartbeats = [own, *_living(view)]
    is_blocked = own.blocked_s > least_s and are_blocked(view, least_s)
    return is_blocked and len({each.place for each in heartbeats}) > 1


def are_blocked(view: View, least_s: float) -> bool:
    """True where every other rank that lives waits for others, and none has moved for so long."""
    return all(heartbeat.blocked_s > least_s for heartbeat in _living(view))


def _living(view: View) -> list[Heartbeat]:
    """The heartbeats of the other ranks whose processes have not ended."""
    return [seen.heartbeat for seen in view.others() if not is_gone(view, seen.heartbeat.rank)]


def slow_step(view: View, own: Heartbeat, took_s: float, median_s: float) -> str:
    """The line about a step that takes long: which ranks are where, and who is unhealthy."""
    wrong = unhealthy(view)
    seen = {**view.seen, own.rank: Seen(own, 0.0, 0.0)}
    whole = View(-1, seen, view.statuses, view.store_silent_s, view.silence_s)
    parts = [spread(whole, [rank for rank in seen if rank not in wrong]), *wrong.values()]
    times, median = number(took_s / median_s, 0), number(median_s, significant=2)
    slow = f"step {own.step} has taken {number(took_s, 1)} s, {times} times the median of {median} s"
    return f"{slow}: {'; '.join(part for part in parts if part)}"


def named(heartbeat: Heartbeat) -> str:
    """A rank with its process and host, by which an operator finds it."""
    return f"rank {heartbeat.rank} (pid {heartbeat.identity.pid} on {heartbeat.identity.host})"


def whereabouts(heartbeat: Heartbeat) -> str:
    """The place where a rank said that it was."""
    return f"in {heartbeat.place}" if heartbeat.place else "outside of the layers"


def ranks_named(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 4`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
