"""Heartbeats: the text by which a rank tells the others where it is, what failed on it, and that it lives."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ds_moe_ep.errors import PeerError
from ds_moe_ep.health.secondary_failures import is_secondary_message
from ds_moe_ep.schedule.spans import Tags

LONGEST_TEXT = 400  # characters of a fault that other ranks' errors quote


@dataclass(slots=True)
class Place:
    """An op of a layer's pass that moves rows: when it began on this rank's clock, and which ranks it waits for."""

    tags: Tags
    op: str
    since_s: float
    waits_for: Sequence[int] = ()

    def __str__(self) -> str:
        layer, phase = self.tags.layer or "MoE layer", self.tags.phase
        return f"{layer}: {phase} {self.op}" if phase else f"{layer}: {self.op}"


@dataclass(frozen=True)
class Fault:
    """An exception that ended a pass, or the process. `is_secondary`: it only tells of another rank's."""

    type_name: str
    text: str
    place: str
    is_secondary: bool = False
    at_s: float = 0.0  # of the host's calendar: orders faults of several ranks, and nothing hangs on it

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" + (f" (in {self.place})" if self.place else "")


@dataclass(frozen=True)
class Identity:
    """A process, told apart from another one that gets its number later. `machine` is where its number counts."""

    host: str
    machine: str
    pid: int
    born: int


@dataclass(frozen=True)
class Heartbeat:
    """One rank's state for the others. `beat` grows with each; times are durations, since no two clocks agree."""

    rank: int
    identity: Identity
    beat: int = 0
    place: str = ""  # where it is
    for_s: float = 0.0  # for how long
    waits_for: tuple[int, ...] = ()
    blocked_s: float = 0.0  # for how long it has not moved in one wait for other ranks
    step: int = -1
    fault: Fault | None = None
    has_left: bool = False
    serves_store: bool = False

    def pack(self) -> str:
        """The heartbeat as text for the store."""
        parts = {"identity": vars(self.identity), "fault": None if self.fault is None else vars(self.fault)}
        return json.dumps({**vars(self), **parts}, separators=(",", ":"))

    @classmethod
    def unpack(cls, text: bytes | str) -> Heartbeat:
        """The heartbeat that `pack` made a text of."""
        values = json.loads(text)
        fault = values["fault"]
        values["identity"], values["waits_for"] = Identity(**values["identity"]), tuple(values["waits_for"])
        values["fault"] = None if fault is None else Fault(**fault)
        return cls(**values)


def is_secondary(error: BaseException) -> bool:
    """True where an exception only tells of another rank: this package's own kind, or a communicator's message.

    Communicators raise RuntimeError. A BrokenPipeError of a data loader has the same words and is this rank's own.
    """
    if isinstance(error, PeerError):
        return error.is_secondary
    return isinstance(error, RuntimeError) and is_secondary_message(str(error))


def fault_of(error: BaseException, place: str) -> Fault:
    """An exception as the other ranks shall read it: its first line, cut where it is long."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = lines[0] if len(lines[0]) <= LONGEST_TEXT else lines[0][:LONGEST_TEXT] + "..."
    return Fault(type(error).__name__, text, place, is_secondary(error), time.time())
