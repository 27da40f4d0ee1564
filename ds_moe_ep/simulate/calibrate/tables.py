"""A calibration for people: the fitted numbers, how far the simulation is off, and the runs that were held out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ds_moe_ep.records.quantity import NONE, number, percent
from ds_moe_ep.records.render import print_lines, print_tables
from ds_moe_ep.records.table import Table, table
from ds_moe_ep.simulate.calibrate.calibrate import Calibration, Errors, errors_of
from ds_moe_ep.simulate.calibrate.probe_fit import SamplePoint
from ds_moe_ep.simulate.cluster.cluster import PARTS, SCALES, Cluster
from ds_moe_ep.simulate.cluster.write import unit_of

LISTED = 24  # runs that were held out, the worst first; the table of errors covers all


def print_calibration(found: Calibration, console: Console) -> None:
    """Prints tables of the fitted numbers, of the errors, and of single runs."""
    tables = (fitted_table(found), error_table(found.points), run_table(found.points))
    print_tables([each for each in tables if each.rows], console)
    lines = []
    if found.pairs:
        lines.append(
            f"order: of {found.pairs} pairs of held-out cases that differ by more than their spread, "
            f"{found.pairs_in_order} are predicted in their order ({percent(found.pairs_in_order / found.pairs, 0)})"
        )
    kept = [part for part in PARTS if not any(path.startswith(f"{part}.") for path in found.fitted)]
    if not found.base.host.cores:
        kept = [part for part in kept if part != "host"]  # there is none
    if kept:
        lines.append(f"no Records of {', '.join(kept)}: these numbers stay as they were")
    print_lines(lines, console)


def fitted_table(found: Calibration) -> Table:
    """A line for each number that was fitted."""
    rows = []
    for path in found.fitted:
        kind, value = kind_of(path), number_at(found.cluster, path)
        unit = unit_of(value, kind)
        scale = SCALES[kind][unit]
        ends = " to ".join(number(end / scale) for end in found.cluster.ranges.get(path, ()))
        rows.append((path, unit, number(number_at(found.base, path) / scale), number(value / scale), ends))
    head = ("number", "unit", "before", "fitted", "range")
    return table(f"{found.base.name}: fitted numbers", head, rows, text_columns=2)


def error_table(points: Sequence[SamplePoint]) -> Table:
    """A line for each group: errors on what was fitted, and on what was held out."""
    rows = []
    for group in dict.fromkeys(point.group for point in points):
        mine = [point for point in points if point.group == group]
        both = (errors_of(p for p in mine if not p.is_held_out), errors_of(p for p in mine if p.is_held_out))
        rows.append((group, *(cell for errors in both for cell in _cells(errors))))
    head = ("of", "fitted", "median", "worst", "held out", "median", "worst")
    return table("Absolute error of the simulation: median and worst", head, rows)


def run_table(points: Sequence[SamplePoint]) -> Table:
    """The held-out runs, as many as are listed, in their order; the worst of them where there are more."""
    held_out = [point for point in points if point.is_held_out]
    worst = sorted(held_out, key=lambda point: -abs(point.error))[:LISTED]
    which = "" if len(held_out) <= LISTED else f", the {LISTED} worst of {len(held_out)}"
    rows = [
        (p.group, p.label, p.unit, number(p.simulated), number(p.measured), f"{'+' * (p.error >= 0)}{percent(p.error)}")
        for p in held_out
        if p in worst
    ]
    head = ("of", "run", "unit", "simulated", "measured", "error")
    return table(f"Runs held out of the fit{which}", head, rows, text_columns=3)


def _cells(errors: Errors | None) -> tuple[str, ...]:
    if errors is None:
        return "0", NONE, NONE
    return str(errors.number), percent(errors.median), percent(errors.worst)


def kind_of(path: str) -> str:
    """The kind of a number, by the names of cluster.SCALES."""
    part, name = path.split(".")
    kind: str = PARTS[part].__dataclass_fields__[name].metadata["kind"]
    return kind


def number_at(cluster: Cluster, path: str) -> float:
    """The number at a path like `far.latency_us`."""
    part, name = path.split(".")
    value: float = getattr(getattr(cluster, part), name)
    return value
