"""Reasons for a layer to measure its schedule again. Local: what a rank sees here is told in the exchange of counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ds_moe_ep.moe.tuner import Choice, Drift, LinkMeter

Agree = Callable[[Sequence[bool]], list[bool]]  # which statements hold on every rank of the group; collective


class HandsOut(Protocol):
    """The layers to which a layer's choice goes."""

    def hand_out(self, source: Any, choice: Choice, agree: Agree, is_first: bool, is_of_rows: bool) -> None:
        """Gives the choice that `source` has just measured to those that it serves. Collective."""


class Retuning:
    """Drift of the rows that a layer receives on this rank, and of its link, since its schedule was measured."""

    def __init__(self, bound: float, alike: HandsOut | None = None) -> None:
        self.rows, self.link = Drift(bound), LinkMeter(bound)
        self.alike = alike
        self.is_apart = False  # the layer has measured because of its own rows: no other layer's choice fits it

    def is_due(self) -> bool:
        """True where this rank wants another measurement."""
        return self.link.is_beyond_bound() or self.rows.is_beyond_bound()

    def measured(self, source: object, choice: Choice, before: Choice | None, agree: Agree, is_of_rows: bool) -> None:
        """The layer, `source`, has measured and takes this choice, which may be what it had before. Collective."""
        self.restart(before is None or before.knobs != choice.knobs)
        if self.alike is not None:
            self.alike.hand_out(source, choice, agree, before is None, is_of_rows)

    def restart(self, has_changed: bool, measured: Retuning | None = None) -> None:
        """A measurement was made, and has changed the schedule or not: this layer's own, or that of `measured`."""
        self.rows.restart(None if measured is None else measured.rows)
        self.link.restart(has_changed)
