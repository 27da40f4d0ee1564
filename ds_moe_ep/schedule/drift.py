"""Drift of the link: how long a row is on its way, against the time when the schedule was chosen.

1. Of the passes that are recorded, in a window of some, the one with the fastest link counts: what disturbs a transfer
   (a late peer, a busy processor) makes it longer, never shorter. So a slow pass does not move it, and a link that has
   become slower does as surely as one that has become faster.
2. It has drifted where the time per row has changed by more than a bound, and the transfers by more than a share of
   the pass, in windows one behind the other: what does not matter to the pass is no reason to measure.
3. A measurement that changes nothing doubles the time until the link may ask for another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_moe_ep.schedule.spans import Span, length, union

SAMPLE_EVERY = 4  # passes: of so many one is recorded
WINDOW = 10  # recorded passes
IN_A_ROW = 2  # windows
SHARE = 0.1  # of a pass
LONGEST_WAIT = 64  # times the least number of passes between two measurements


@dataclass(frozen=True)
class LinkSample:
    """A forward pass: its time, how long some transfer was on its way, and the rows that it sent to other ranks."""

    pass_us: float
    transfer_us: float
    num_rows: int

    @classmethod
    def of(cls, spans: Iterable[Span], num_rows: int) -> LinkSample | None:
        """The sample of a recorded pass; None where it moved nothing."""
        forward = [span for span in spans if span.tags.phase == "forward"]
        transfers = [(span.start_us, span.stop_us) for span in forward if span.lane != "compute"]
        if not transfers or not num_rows:
            return None
        pass_us = max(span.stop_us for span in forward) - min(span.start_us for span in forward)
        return cls(pass_us, length(union(transfers)), num_rows)

    @property
    def row_us(self) -> float:
        """Time on the link per row."""
        return self.transfer_us / self.num_rows

    def is_far_from(self, base: LinkSample, bound: float) -> bool:
        """True where the link has changed by the bound, and the pass by what it cannot leave unnoticed."""
        ratio = self.row_us / max(base.row_us, 1e-9)
        moved_us = abs(self.row_us - base.row_us) * self.num_rows
        return not 1 / (1 + bound) <= ratio <= 1 + bound and moved_us > SHARE * max(self.pass_us, base.pass_us)


class LinkDrift:
    """The drift of one rank's link since the last measurement. Local."""

    def __init__(self, bound: float, least_passes: int) -> None:
        self._bound, self._least_passes = bound, least_passes
        self._patience = 1
        self._restart()

    def _restart(self) -> None:
        self._base: LinkSample | None = None
        self._window: list[LinkSample] = []
        self._num_far = self._passes = 0

    def restart(self, has_changed: bool) -> None:
        """A measurement was made, and has changed the schedule or not."""
        self._patience = 1 if has_changed else min(2 * self._patience, LONGEST_WAIT)
        self._restart()

    def passes(self) -> bool:
        """Counts a pass of training; True where it is to be recorded."""
        self._passes += 1
        return bool(self._bound) and self._passes % SAMPLE_EVERY == 0

    def see(self, sample: LinkSample) -> None:
        """One recorded pass."""
        self._window.append(sample)
        if len(self._window) < WINDOW:
            return
        fastest, self._window = min(self._window, key=lambda each: each.row_us), []
        if self._base is None:
            self._base = fastest
        elif fastest.is_far_from(self._base, self._bound):
            self._num_far += 1
        else:
            self._num_far = 0

    def is_beyond_bound(self) -> bool:
        """True where this rank wants another measurement."""
        return self._num_far >= IN_A_ROW and self._passes >= self._patience * self._least_passes
