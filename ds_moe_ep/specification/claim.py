"""`Claim`: one statement of the specification's document, with the functions that derive, simulate and judge it.

A derived number says what arithmetic allows on the stated hardware, not what any program reached. Every verdict is
computed from numbers, so that it turns with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.sizing.footprint import Memory
from ds_moe_ep.specification.laws import LawFit
from ds_moe_ep.specification.stated import HARDWARE, STATED, Hardware, Stated

SYSTEMS = {"tp8_pp2": "TP8/PP2", "ep16": "EP16"}  # the document's two, in the order of its pairs of numbers


@dataclass(frozen=True, kw_only=True)
class FigureNumber:
    """One number of a claim, stated and derived, in `unit`; None where there is none."""

    what: str
    unit: str
    stated: float | None = None
    derived: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One claim on its hardware, for a reader: as stated, as it follows from shapes, and how the two agree."""

    key: str
    name: str
    section: str  # of the document
    stated: str
    derived: str
    verdict: str
    numbers: tuple[FigureNumber, ...] = ()


@dataclass(frozen=True)
class Derived:
    """Consequence of shapes, peaks and links: its text, its numbers, and the values that a verdict needs."""

    text: str
    numbers: tuple[FigureNumber, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Answer of a simulation to one claim: a text, its numbers, and what it adds to the verdict."""

    text: str
    numbers: tuple[Quantity, ...] = ()
    verdict: str = ""


class SimulatedStep(Protocol):
    """A simulated step of one job, with its bar."""

    @property
    def step(self) -> Any: ...
    @property
    def steps(self) -> Sequence[Any]: ...
    @property
    def tps(self) -> Quantity: ...
    @property
    def hidden(self) -> Quantity | None: ...
    def estimate(self, of: Callable[[Any], float], unit: str = "") -> Quantity: ...
    def over(self, other: Any) -> Quantity: ...


class SimulatedJobs(Protocol):
    """The document's two jobs, simulated on a cluster: what the audit gives to each claim."""

    @property
    def ep16(self) -> SimulatedStep: ...
    @property
    def base(self) -> SimulatedStep: ...
    @property
    def ep16_forward(self) -> SimulatedStep: ...
    @property
    def base_forward(self) -> SimulatedStep: ...
    @property
    def ep16_kept(self) -> SimulatedStep | None: ...
    @property
    def base_kept(self) -> SimulatedStep | None: ...
    @property
    def serial(self) -> SimulatedStep: ...
    @property
    def free_bytes(self) -> float: ...
    def memory(self, system: str) -> tuple[Memory, int]: ...
    def law_fits(self, total: str) -> Sequence[LawFit]: ...


@dataclass(frozen=True)
class Claim:
    """One row: what the document states, what follows from its shapes, what a simulation says, and the verdict."""

    key: str
    name: str
    section: str
    stated: Callable[[Stated], str]
    derive: Callable[[Stated, Hardware], Derived]
    judge: Callable[[Stated, Derived], str]
    simulate: Callable[[SimulatedJobs, Stated], Simulated] | None = None  # None where shapes alone decide

    def figure(self, stated: Stated = STATED, hardware: Hardware = HARDWARE) -> Figure:
        """The claim with its numbers on some hardware."""
        derived = self.derive(stated, hardware)
        return Figure(
            key=self.key,
            name=self.name,
            section=self.section,
            stated=self.stated(stated),
            derived=derived.text,
            verdict=self.judge(stated, derived),
            numbers=derived.numbers,
        )
