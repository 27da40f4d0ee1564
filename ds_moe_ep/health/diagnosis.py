"""What the signs of all ranks say: who is in trouble, what failed first, who is where. Pure functions of one view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.health.board import Seen
from ds_moe_ep.health.heartbeat import Fault, Sign
from ds_moe_ep.health.processes import Life

MOST_NAMED = 4  # ranks in trouble that one error names


@dataclass(frozen=True)
class View:
    """All that rank `own` knows of the ranks: their signs, what its machine says, since when the store is silent."""

    own: int
    seen: Mapping[int, Seen]
    lives: Mapping[int, Life]
    store_silent_s: float
    silence_s: float  # who gives no sign for so long is in trouble

    def others(self) -> list[Seen]:
        return [self.seen[rank] for rank in sorted(self.seen) if rank != self.own]


def is_gone(view: View, rank: int) -> bool:
    """Whether a rank's process has ended."""
    seen = view.seen.get(rank)
    return view.lives.get(rank) is Life.GONE or (seen is not None and seen.sign.has_left)


def is_silent(view: View, rank: int) -> bool:
    """Whether a rank whose process may live shows no sign of life."""
    seen = view.seen.get(rank)
    if seen is None or is_gone(view, rank):
        return False
    return view.lives.get(rank) is Life.STOPPED or seen.silent_s > view.silence_s


def troubles(view: View) -> dict[int, str]:
    """What is wrong with each rank that is gone or silent, itself and the faults that ranks told of left out."""
    wrong = {}
    for seen in view.others():
        sign = seen.sign
        if is_silent(view, sign.rank):
            life = view.lives.get(sign.rank, Life.UNKNOWN)
            state = "is stopped" if life is Life.STOPPED else f"has given no sign of life for {seen.silent_s:.0f} s"
        elif is_gone(view, sign.rank) and sign.fault is None:
            state = "has ended" if sign.has_left else "is gone"
        else:
            continue
        wrong[sign.rank] = f"{named(sign)} {state}, last seen {whereabouts(sign)}"
    return wrong


def first_fault(view: View, is_echo: bool = False) -> tuple[int, Fault] | None:
    """The first fault that any rank told of, and the rank. Echoes only tell of another rank's."""
    faults = [(s.sign.fault.at_s, s.sign.rank, s.sign.fault) for s in view.others() if s.sign.fault is not None]
    found = sorted(
        ((at_s, rank, fault) for at_s, rank, fault in faults if fault.is_echo == is_echo), key=lambda f: f[:2]
    )
    return (found[0][1], found[0][2]) if found else None


def culprits(view: View, ranks: Iterable[int]) -> list[int]:
    """Those of the ranks that are gone or silent, or told of a fault of their own."""
    wrong = troubles(view)
    faults = {rank: seen.sign.fault for rank, seen in view.seen.items()}
    return [rank for rank in ranks if rank in wrong or ((fault := faults.get(rank)) is not None and not fault.is_echo)]


def explain(view: View, suspects: Iterable[int]) -> str:
    """Why `suspects` did not answer, in one clause: who is in trouble and what failed first, or where they are."""
    wrong = list(troubles(view).values())
    parts = wrong[:MOST_NAMED]
    if len(wrong) > MOST_NAMED:
        parts.append(f"{len(wrong) - MOST_NAMED} more ranks are in trouble")
    if view.store_silent_s > view.silence_s:
        servers = [named(seen.sign) for seen in view.others() if seen.sign.serves_store]
        parts.append(f"the ranks' store{f', on {servers[0]},' if servers else ''} does not answer")
    root = first_fault(view)
    if root is not None:
        parts.append(f"first error: rank {root[0]}: {root[1]}")
    if not parts:
        places = spread(view, suspects)
        echo = first_fault(view, is_echo=True)
        parts = [places] if places else []
        parts += [f"first error: rank {echo[0]}: {echo[1]}"] if echo is not None else []
    return "; ".join(parts)


def spread(view: View, ranks: Iterable[int]) -> str:
    """Which of the ranks are where, those at one place together; ranks without a sign are left out."""
    at: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank in sorted(ranks):
        if rank in view.seen:
            sign = view.seen[rank].sign
            waits_for = tuple(other for other in sign.waits_for if other not in ranks or len(sign.waits_for) == 1)
            at.setdefault((whereabouts(sign), waits_for), []).append(rank)
    return "; ".join(
        f"{ranks_named(members)} {'is' if len(members) == 1 else 'are'} {place}"
        + (f", waiting for {ranks_named(waits_for)}" if waits_for else "")
        for (place, waits_for), members in at.items()
    )


def is_deadlocked(view: View, own: Sign, least_s: float) -> bool:
    """Whether every rank that lives waits for others, in more than one place, and none has moved for so long.

    Ranks in one place may be in a collective that is slow; a rank that waits for none may come yet.
    """
    signs = [own, *(seen.sign for seen in view.others() if not is_gone(view, seen.sign.rank))]
    return len({sign.place for sign in signs}) > 1 and min(sign.blocked_s for sign in signs) > least_s


def slow_step(view: View, own: Sign, took_s: float, median_s: float) -> str:
    """The line about a step that takes long: which ranks are where, and who is in trouble."""
    wrong = troubles(view)
    seen = {**view.seen, own.rank: Seen(own, 0.0, 0.0)}
    whole = View(-1, seen, view.lives, view.store_silent_s, view.silence_s)
    parts = [spread(whole, [rank for rank in seen if rank not in wrong]), *wrong.values()]
    times = took_s / median_s
    return f"step {own.step} has taken {took_s:.1f} s, {times:.0f} times the median of {median_s:.2g} s: " + "; ".join(
        part for part in parts if part
    )


def named(sign: Sign) -> str:
    """A rank with what an operator needs to find it."""
    return f"rank {sign.rank} (pid {sign.identity.pid} on {sign.identity.host})"


def whereabouts(sign: Sign) -> str:
    """Where a rank said that it was."""
    return f"in {sign.place}" if sign.place else "outside of the layers"


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
