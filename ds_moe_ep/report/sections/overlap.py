"""The section on schedules: one layer, serial and overlapped, over the links between its nodes."""

from __future__ import annotations

from collections.abc import Mapping

from ds_moe_ep.records.names import DEVICES, SIDES
from ds_moe_ep.records.quantity import NONE, TIMES, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import shaping_order
from ds_moe_ep.report.page import Block, PageSection, Picture, basis_of
from ds_moe_ep.report.plots.overlap import LinkPanel, draw_overlap

MEASURES: Mapping[str, tuple[str, str, str]] = {  # of a step: unit, axis, title
    "time": ("s", "seconds of a step", "time"),
    "hidden": ("percent", "% of the transfers' time", "hidden behind compute"),
}
Sides = dict[str, dict[str, Record]]  # by side and shaping


def overlap(findings: Findings) -> PageSection | None:
    """A picture of all devices, and a table for each."""
    found = {device: {what: _sides(findings, device, what) for what in MEASURES} for device in DEVICES}
    panels = [
        _panel(device, what, sides) for device, measures in found.items() for what, sides in measures.items() if sides
    ]
    if not panels:
        return None
    used = [record for measures in found.values() for sides in measures.values() for record in _records(sides)]
    caption = (
        "A step is one layer's forward and backward pass, its slowest rank's; points are medians, whiskers quartiles. "
        f"\u201c{SIDES['wire']}\u201d is the serial layer with experts that take no time."
    )
    picture = Picture("overlap", "Schedules over links", caption, draw_overlap(panels, SIDES), basis_of(used))
    blocks: list[Block] = [picture]
    blocks += [_table(device, measures) for device, measures in found.items() if measures["time"]]
    return PageSection("Schedules over links", tuple(blocks))


def _sides(findings: Findings, device: str, what: str) -> Sides:
    below = findings.below("overlap", device)
    found: Sides = {}
    for name, record in below.items():
        shaping, side, phase, its_what = name.rsplit(".", 3)
        if phase == "step" and its_what == what:
            found.setdefault(side, {})[shaping] = record
    return {side: found[side] for side in SIDES if side in found}


def _records(sides: Sides) -> list[Record]:
    return [record for by_shaping in sides.values() for record in by_shaping.values()]


def _shapings(sides: Sides) -> list[str]:
    return sorted({shaping for by_shaping in sides.values() for shaping in by_shaping}, key=shaping_order)


def _panel(device: str, what: str, sides: Sides) -> LinkPanel:
    unit, axis, title = MEASURES[what]
    shapings = _shapings(sides)
    ratios = [shaping.partition(" of ") for shaping in shapings]
    are_ratios = len({phase for _, _, phase in ratios}) == 1 and all(word for _, word, _ in ratios)
    return LinkPanel(
        title=f"{DEVICES[device]}: {title}",
        axis="traffic alone over compute" if are_ratios else "link of a node",
        unit=axis,
        places=[float(value) for value, _, _ in ratios] if are_ratios else range(len(shapings)),
        links=[value for value, _, _ in ratios] if are_ratios else [_title(shaping) for shaping in shapings],
        sides={
            side: {i: convert(by_shaping[s], unit) for i, s in enumerate(shapings) if s in by_shaping}
            for side, by_shaping in sides.items()
        },
    )


def _table(device: str, measures: Mapping[str, Sides]) -> Table:
    times, hidden = measures["time"], measures["hidden"]
    shapings = _shapings(times)
    rows = tuple(
        (SIDES[side], *(_cell(times[side].get(shaping), hidden.get(side, {}).get(shaping)) for shaping in shapings))
        for side in times
    )
    head = ("schedule", *map(_title, shapings))
    return Table(f"{DEVICES[device]}: ms of a step, and % hidden", head, rows, basis_of(_records(times)))


def _title(shaping: str) -> str:
    """A link in few words: "traffic 0.3 x compute" for "0.3 of step"."""
    ratio, word, phase = shaping.partition(" of ")
    if not word:
        return shaping.replace("mbit", "Mbit/s")
    return f"traffic {ratio} {TIMES} compute" + ("" if phase == "step" else f", {phase}")


def _cell(time: Record | None, hidden: Record | None) -> str:
    if time is None:
        return NONE
    text = number(convert(time, "ms").value)
    return text if hidden is None else f"{text}\n{number(convert(hidden, 'percent').value)} %"
