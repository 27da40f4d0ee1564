"""The end of a rank, as the others tell it. No torch."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import queue
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from rich.console import Console

from ds_moe_ep.bench.demo.plan import NUM_RANKS, TIMEOUT_S, DemoPlan
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.errors import EngineError
from ds_moe_ep.records.quantity import number

LIMIT_S = 2 * TIMEOUT_S  # for the ranks to start and run one pass; then, again, for the survivors' words


@dataclass(frozen=True)
class Saying:
    """Words of a survivor, and how many seconds after the death."""

    rank: int
    after_s: float
    text: str


@dataclass(frozen=True)
class Death:
    """The rank that was killed, its process, and what the others said of it."""

    victim: int
    pid: int
    sayings: tuple[Saying, ...]

    def is_named_in(self, text: str) -> bool:
        """True where a text says that the victim is gone, by its rank and its process."""
        return any(f"rank {self.victim} (pid {self.pid} on " in part and "is gone" in part for part in text.split("; "))

    @property
    def is_named_by_all(self) -> bool:
        """True where every survivor said who died."""
        naming = {saying.rank for saying in self.sayings if self.is_named_in(saying.text)}
        return naming == set(range(NUM_RANKS)) - {self.victim}

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        sayings = [
            {"rank": said.rank, "after_s": said.after_s, "names_it": self.is_named_in(said.text), "text": said.text}
            for said in self.sayings
        ]
        return {"emulated": True, "killed": self.victim, "named_by_all": self.is_named_by_all, "survivors": sayings}


def watch_death(plan: DemoPlan, processes: Sequence[BaseProcess], inbox: multiprocessing.Queue[Finding]) -> Death:
    """Waits for the victim's end and for the words of the others. Raises EngineError where one does not come."""
    assert plan.victim is not None
    victim = processes[plan.victim]
    if not multiprocessing.connection.wait([victim.sentinel], LIMIT_S):
        raise EngineError(f"demo.kill={plan.victim}: the rank did not come to its pass within {LIMIT_S:g} s; try again")
    died_s = time.monotonic()
    said: list[Saying] = []
    while len(said) < NUM_RANKS - 1:
        try:
            finding = inbox.get(timeout=max(0.0, died_s + LIMIT_S - time.monotonic()))
        except queue.Empty:
            break
        if finding.kind == "error":
            raise EngineError(f"demo.kill={plan.victim}: rank {finding.rank} failed:\n{finding.text}")
        if finding.kind == "said":
            said.append(Saying(finding.rank, max(0.0, finding.samples["at"][0] - died_s), finding.text))
    return Death(plan.victim, victim.pid or 0, tuple(sorted(said, key=lambda saying: saying.rank)))


def show_death(death: Death, console: Console) -> None:
    """Prints who was killed, and what each of the others said."""
    lines = [
        f"emulated experts and link, real ranks, a real SIGKILL: rank {death.victim} of {NUM_RANKS} "
        f"(pid {death.pid}) was killed in the middle of a forward pass"
    ]
    for said in death.sayings:
        verb = "names" if death.is_named_in(said.text) else "does not name"
        lines += ["", f"rank {said.rank} {verb} it {number(said.after_s, 2)} s later. PeerError: {said.text}"]
    for rank in sorted(set(range(NUM_RANKS)) - {death.victim, *(said.rank for said in death.sayings)}):
        lines += ["", f"rank {rank} says nothing"]
    for line in lines:
        console.print("\n".join(textwrap.wrap(line, console.width)), markup=False, highlight=False)
