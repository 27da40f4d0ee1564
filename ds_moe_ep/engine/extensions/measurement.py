"""Measurement of a step: a table for people, events for DeepSpeed's monitor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ds_moe_ep.records.quantity import number
from ds_moe_ep.schedule.spans import Overlap, Tags

Event = tuple[str, float, int]

ROW = "{:<24} {:<9} {:<16} {:>10} {:>10} {:>10} {:>9} {:>10}"
HEAD = ("layer", "pass", "peers", "total ms", "exposed ms", "hidden ms", "hidden %", "blocking %")


@dataclass(frozen=True)
class Measurement(Overlap):
    """The communication of one optimizer step: the whole of it, and its parts. Times are summed over the ranks.

    `parts` has the keys of `timeline.accounts`: Tags(layer, phase, peers), and sums in which an empty field stands for
    all. They follow from the schedules: a part in which nothing ran is there, with zeros. `lanes` are "dispatch" and
    "combine". `step` counts this engine's optimizer steps, from 1.
    """

    step: int
    num_ranks: int
    parts: Mapping[Tags, Overlap]
    lanes: Mapping[str, Overlap]

    def mean_ms(self, time_us: float) -> float:
        """Milliseconds of the mean rank, from a time summed over the ranks."""
        return time_us / self.num_ranks / 1000


def table(measured: Measurement, control: Measurement | None) -> str:
    """A line per part, times of the mean rank, and the control's percentage beside each percentage."""
    ranks = "rank" if measured.num_ranks == 1 else "ranks"
    blocking = f"; blocking: step {control.step}" if control is not None else ""
    lines = [f"communication of step {measured.step}, mean of {measured.num_ranks} {ranks}{blocking}"]
    lines.append(ROW.format(*HEAD))
    for key, part in measured.parts.items():
        if key.phase or not key.layer:  # a layer's two passes say more than their sum
            control_part = control.parts.get(key) if control is not None else None
            times = (number(measured.mean_ms(time), 2) for time in (part.total_us, part.exposed_us, part.hidden_us))
            names = (name or "all" for name in (key.layer, key.phase, key.peers))
            lines.append(ROW.format(*names, *times, percent(part), percent(control_part)))
    for lane, part in measured.lanes.items():
        control_part = control.lanes.get(lane) if control is not None else None
        times = (number(measured.mean_ms(time), 2) for time in (part.total_us, part.exposed_us, part.hidden_us))
        lines.append(ROW.format("all", "all", f"{lane} lane", *times, percent(part), percent(control_part)))
    return "\n".join(lines)


def percent(part: Overlap | None) -> str:
    """The hidden share as text; n/a where nothing was measured."""
    return "n/a" if part is None or part.hidden_percent is None else number(part.hidden_percent, 1)


def events(measured: Measurement, control: Measurement | None, num_samples: int) -> list[Event]:
    """Events for `engine.monitor`: milliseconds of the mean rank, and percentages with their control's beside them."""
    found = list(_percentages("Train/moe_ep", measured, control, num_samples))
    for key, part in measured.parts.items():
        if key.layer and key.phase and not key.peers:
            name = f"Train/moe_ep/{key.layer}/{key.phase}"
            times_us = {"exposed": part.exposed_us, "hidden": part.hidden_us, "total": part.total_us}
            found += [(f"{name}/{what}_ms", measured.mean_ms(time), num_samples) for what, time in times_us.items()]
            found += _percentages(name, part, control.parts.get(key) if control is not None else None, num_samples)
    return found


def _percentages(name: str, part: Overlap, control: Overlap | None, num_samples: int) -> Iterator[Event]:
    if part.hidden_percent is not None:
        yield f"{name}/hidden_percent", part.hidden_percent, num_samples
    if control is not None and control.hidden_percent is not None:
        yield f"{name}/hidden_percent_blocking_control", control.hidden_percent, num_samples
