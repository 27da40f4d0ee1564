"""A calibration for people: what was fitted, how far it is off, and the runs that were held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from ds_moe_ep.simulate.calibrate.calibrate import Calibration, Errors, errors_of
from ds_moe_ep.simulate.calibrate.probe_fit import SamplePoint
from ds_moe_ep.simulate.cluster.cluster import PARTS, SCALES, Cluster
from ds_moe_ep.simulate.cluster.write import unit_of

LISTED = 24  # runs that were held out, the worst first; the table of errors covers all


def print_calibration(found: Calibration, console: Console) -> None:
    """Prints tables of the fitted numbers, of the errors, and of single runs."""
    for table in (fitted_table(found), error_table(found.points), run_table(found.points)):
        if table.row_count:
            console.print(table)
    if found.pairs:
        console.print(
            f"order: of {found.pairs} pairs of held-out cases that differ by more than their spread, "
            f"{found.pairs_in_order} are predicted in their order ({found.pairs_in_order / found.pairs:.0%})"
        )
    kept = [part for part in PARTS if not any(path.startswith(f"{part}.") for path in found.fitted)]
    if not found.base.host.cores:
        kept = [part for part in kept if part != "host"]  # there is none
    if kept:
        console.print(f"no Records of {', '.join(kept)}: these numbers stay as they were")


def fitted_table(found: Calibration) -> Table:
    """A line for each number that was fitted."""
    table = Table(title=f"{found.base.name}: fitted numbers")
    for column in ("number", "before", "fitted", "range", "unit"):
        table.add_column(column, justify="left" if column in ("number", "unit") else "right", no_wrap=True)
    for path in found.fitted:
        kind, value = kind_of(path), number_at(found.cluster, path)
        unit = unit_of(value, kind)
        scale = SCALES[kind][unit]
        pair = found.cluster.ranges.get(path)
        ends = "" if pair is None else f"{pair[0] / scale:,.4g} to {pair[1] / scale:,.4g}"
        table.add_row(path, f"{number_at(found.base, path) / scale:,.4g}", f"{value / scale:,.4g}", ends, unit)
    return table


def error_table(points: Sequence[SamplePoint]) -> Table:
    """A line for each group: errors on what was fitted, and on what was held out."""
    table = Table(title="Absolute error of the simulation: median and worst")
    for column in ("what", "fitted", "median", "worst", "held out", "median", "worst"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for group in dict.fromkeys(point.group for point in points):
        mine = [point for point in points if point.group == group]
        both = (errors_of(p for p in mine if not p.is_held_out), errors_of(p for p in mine if p.is_held_out))
        table.add_row(group, *(cell for errors in both for cell in _cells(errors)))
    return table


def run_table(points: Sequence[SamplePoint]) -> Table:
    """The held-out runs, as many as are listed, in their order; the worst of them where there are more."""
    held_out = [point for point in points if point.is_held_out]
    worst = sorted(held_out, key=lambda point: -abs(point.error))[:LISTED]
    which = "" if len(held_out) <= LISTED else f", the {LISTED} worst of {len(held_out)}"
    table = Table(title=f"Runs held out of the fit{which}")
    for column in ("what", "run", "simulated", "measured", "unit", "error"):
        table.add_column(column, justify="left" if column in ("what", "run", "unit") else "right", no_wrap=True)
    for point in held_out:
        if point in worst:
            numbers = (f"{point.simulated:,.4g}", f"{point.measured:,.4g}", point.unit, f"{100 * point.error:+.1f} %")
            table.add_row(point.group, point.label, *numbers)
    return table


def _cells(errors: Errors | None) -> Iterator[str]:
    if errors is None:
        yield from ("0", "-", "-")
    else:
        yield from (str(errors.number), f"{100 * errors.median:.1f} %", f"{100 * errors.worst:.1f} %")


def kind_of(path: str) -> str:
    """What a number measures, by the names of cluster.SCALES."""
    part, name = path.split(".")
    kind: str = PARTS[part].__dataclass_fields__[name].metadata["kind"]
    return kind


def number_at(cluster: Cluster, path: str) -> float:
    """The number at a path like `far.latency_us`."""
    part, name = path.split(".")
    value: float = getattr(getattr(cluster, part), name)
    return value
