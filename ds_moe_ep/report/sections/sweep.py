"""The section on simulated scaling: the specification's four laws beyond the ranks at which anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.quantity import Quantity, cell, convert
from ds_moe_ep.records.record import Record, replace_file
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings, read_findings
from ds_moe_ep.report.known_names import number_in, short_environment
from ds_moe_ep.report.page import Block, PageSection, Picture, basis_of
from ds_moe_ep.report.plots.sweep import SweepLine, SweepPanel, draw_sweep
from ds_moe_ep.report.sections.scaling import UNITS, fit_text, fits_table
from ds_moe_ep.specification.laws import SHAPES

PROPORTION = "in proportion to devices"
OVER_EP = "EP (ranks that share the experts)"
MFU = ("percent", "% of the devices' peak")
HEAD = ("EP", "copies", "tokens/s", "\u00b5s per token", "busy, %", "MB per expert", "of peak, %", "hidden, %", "GB")
Points = dict[tuple[int, int], Record]  # by EP and copies


def simulated_scaling(findings: Findings) -> PageSection | None:
    """Per environment: a picture over EP, one over copies where these vary, a table of all points, one of the fits."""
    blocks: list[Block] = []
    for environment in findings.swept:
        over_ep, over_dp = _over_ep(findings, environment), _over_dp(findings, environment)
        if over_ep:
            blocks.append(_picture(findings, environment, f"sweep_{environment}", "Scaling with EP", over_ep))
        if over_dp:
            blocks.append(
                _picture(
                    findings, environment, f"sweep_copies_{environment}", "Scaling with copies of the experts", over_dp
                )
            )
        blocks += [*_points_tables(findings, environment), *_fits_table(findings, environment)]
    return PageSection("Scaling, simulated", tuple(blocks)) if blocks else None


def _picture(findings: Findings, environment: str, key: str, title: str, panels: list[SweepPanel]) -> Picture:
    caption = (
        "Simulated: whiskers hold what comes out where all of the cluster's ranges are at their slower ends, and where "
        "all are at their faster ones. R\u00b2: here, and as the specification states it."
    )
    used = list(findings.below("sweep", environment).values())
    return Picture(key, f"{title}, {short_environment(environment)}", caption, draw_sweep(panels), basis_of(used))


def _points(findings: Findings, environment: str, total: str, what: str) -> Points:
    found: Points = {}
    for name, record in findings.below("sweep", environment, total).items():
        parts = name.split(".")
        if len(parts) == 3 and parts[2] == what:
            found[number_in(parts[0], "ep"), number_in(parts[1], "dp")] = record
    return dict(sorted(found.items()))


def _over_ep(findings: Findings, environment: str) -> list[SweepPanel]:
    """A panel per law, of the points with the fewest copies; none where EP does not vary."""
    panels = []
    for law, title in LAWS.items():
        unit, axis = UNITS[law]
        lines, fits = [], []
        for total, label in TOTALS.items():
            points = _points(findings, environment, total, law)
            least = min((dp for _, dp in points), default=1)
            values = {ep: convert(record, unit) for (ep, dp), record in points.items() if dp == least}
            if len(values) > 1:
                lines.append(SweepLine(label, values, _law(findings, environment, total, law, unit)))
                fits.append(findings.get("sweep", environment, total, "fit", law, "r2"))
        r2 = [fit.value for fit in fits if fit]
        if lines:
            panels.append(SweepPanel(title, fit_text(law, r2) if r2 else "", OVER_EP, axis, lines, unit == "percent"))
    return panels


def _law(findings: Findings, environment: str, total: str, law: str, unit: str) -> Callable[[float], float] | None:
    record = findings.get("sweep", environment, total, "fit", law, "coefficient")
    return None if record is None else partial(_at, convert(record, unit).value, SHAPES[law])


def _at(factor: float, shape: Callable[[float], float], size: float) -> float:
    return factor * shape(size)


def _over_dp(findings: Findings, environment: str) -> list[SweepPanel]:
    """Throughput and utilization over devices, for the EP of which there are most copies."""
    panels = []
    for what, title in (("tps", "TPS"), ("mfu", "Model-flop utilization")):
        unit, axis = UNITS["tps"] if what == "tps" else MFU
        lines = []
        for total, label in TOTALS.items():
            points = _points(findings, environment, total, what)
            sizes = [ep for ep, dp in points if dp > 1]
            ep = max(set(sizes), key=sizes.count, default=0)
            values = {ep * dp: convert(record, unit) for (size, dp), record in points.items() if size == ep}
            if len(values) > 1:
                lines.append(SweepLine(label, values, _linear(values) if what == "tps" else None))
        if lines:
            x_label = f"devices (EP={ep} times copies)"
            panels.append(SweepPanel(title, "", x_label, axis, lines, unit == "percent", PROPORTION))
    return panels


def _linear(values: Mapping[int, Quantity]) -> Callable[[float], float]:
    """As many times the throughput of the fewest devices as there are devices."""
    least = min(values)
    return partial(_at, values[least].value / least, lambda size: size)


def _points_tables(findings: Findings, environment: str) -> list[Table]:
    tables = []
    units = {**{law: UNITS[law][0] for law in LAWS}, "mfu": "percent", "hidden": "percent", "memory": "GB"}
    for total, title in TOTALS.items():
        columns = {what: _points(findings, environment, total, what) for what in units}
        rows = [
            (str(ep), str(dp), *(cell(columns[what].get((ep, dp)), unit) for what, unit in units.items()))
            for ep, dp in columns["tps"]
        ]
        if rows:
            used = [record for points in columns.values() for record in points.values()]
            tables.append(Table(f"{title}, {short_environment(environment)}", HEAD, tuple(rows), basis_of(used)[:1]))
    return tables


def _fits_table(findings: Findings, environment: str) -> list[Table]:
    fits = {
        (law, total): fit
        for law in LAWS
        for total in TOTALS
        if (fit := findings.get("sweep", environment, total, "fit", law, "r2"))
    }
    table = fits_table(f"How well the laws fit, {short_environment(environment)}", "simulated", fits)
    return [table] if table else []


def draw_curves(records: Path) -> list[Path]:
    """The pictures of a file of Records, written beside it: x.png and x.svg of x.jsonl. Raises ConfigError."""
    section = simulated_scaling(read_findings([records]))
    pictures = [block for block in section.blocks if isinstance(block, Picture)] if section else []
    written = []
    for picture in pictures:
        end = "_copies" if picture.key.startswith("sweep_copies") else ""
        for kind, content in (("png", picture.drawing.png), ("svg", picture.drawing.svg)):
            path = records.with_name(f"{records.name.removesuffix('.jsonl')}{end}.{kind}")
            try:
                replace_file(path, content)
            except OSError as error:
                raise ConfigError(f"out={path}: cannot be written ({error}); name a folder of your own") from error
            written.append(path)
    return written
