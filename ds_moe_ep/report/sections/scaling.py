"""The section on scaling: the specification's four laws of EP, measured points and fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.quantity import SCALES, SPELLINGS, Quantity, convert
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import number_in
from ds_moe_ep.report.page import PageSection, Picture, basis_of
from ds_moe_ep.report.plots.lines import LawPanel, draw_scaling
from ds_moe_ep.specification.laws import SHAPES, STATED_R2, r2_text

UNITS: Mapping[str, tuple[str, str]] = {  # what Records are converted to, and how an axis calls it
    "tps": ("tokens/s", "tokens per second"),
    "tpot": ("us", "\u00b5s per token"),
    "busy": ("percent", "busy, % of a step"),
    "memory_per_expert": ("MB", "MB of an expert on a rank"),
}


def scaling(findings: Findings) -> PageSection | None:
    """Four laws under two totals: points, fits, and how well they fit beside what the specification states."""
    panels: list[LawPanel] = []
    used: list[Record] = []
    for law in LAWS:
        for total in TOTALS:
            points = _points(findings, total, law)
            if points:
                used += points.values()
                panels.append(_panel(findings, total, law, points))
    if not panels:
        return None
    caption = "Each law is its shape times one fitted coefficient. R\u00b2: here, and as the specification states it."
    picture = Picture("scaling", "Scaling with EP", caption, draw_scaling(panels), basis_of(used))
    fits = {(law, total): fit for law in LAWS for total in TOTALS if (fit := r2_of(findings, total, law))}
    table = fits_table("How well the laws fit", "here", fits)
    return PageSection("Scaling", (picture, *([table] if table else [])))


def r2_of(findings: Findings, total: str, law: str) -> Record | None:
    """The fit of the law under this total."""
    return findings.get("scaling", total, "fit", law, "r2")


def _points(findings: Findings, total: str, law: str) -> dict[int, Record]:
    below = findings.below("scaling", total)
    split = {name: name.split(".") for name in below if name.startswith("ep")}
    points = {number_in(parts[0], "ep"): below[name] for name, parts in split.items() if parts[1] == law}
    return dict(sorted(points.items()))


def _panel(findings: Findings, total: str, law: str, points: Mapping[int, Record]) -> LawPanel:
    unit, axis = UNITS[law]
    quantities: dict[int, Quantity] = {ep: convert(record, unit) for ep, record in points.items()}
    factor = _coefficient(findings, total, law, next(iter(points.values())))
    r2 = r2_of(findings, total, law)
    text = fit_text(law, [r2.value]) if r2 else ""
    curve = None if factor is None else (lambda ep: factor * SHAPES[law](ep))
    emulated = " (emulated)" if next(iter(points.values())).emulated else ""
    return LawPanel(LAWS[law], f"{TOTALS[total]}{emulated}", axis, quantities, curve, text)


def _coefficient(findings: Findings, total: str, law: str, point: Record) -> float | None:
    """The coefficient in the axis' unit; where its own unit says something else, it is in the points' unit."""
    record = findings.get("scaling", total, "fit", law, "coefficient")
    if record is None:
        return None
    unit, _ = UNITS[law]
    own, theirs = (SCALES.get(SPELLINGS.get(name, name)) for name in (record.unit, unit))
    is_same_kind = own is not None and theirs is not None and own[0] == theirs[0]
    scale = convert(point, unit).value / point.value if point.value and not is_same_kind else None
    return record.value * scale if scale is not None else convert(record, unit).value


def fit_text(law: str, r2: Sequence[float]) -> str:
    """The fit of a law, above its panel: "R2 0.963, stated 0.97", or that it does not fit."""
    here, stated_r2 = " and ".join(dict.fromkeys(map(r2_text, r2))), str(STATED_R2[law])
    return f"R\u00b2 {here}, stated {stated_r2}" if min(r2) >= 0 else f"{here}, stated R\u00b2 {stated_r2}"


def fits_table(title: str, here: str, fits: Mapping[tuple[str, str], Record]) -> Table | None:
    """A row for each law that has a fit: the R2 that is stated, and those of `fits`, by law and total."""
    rows = [
        (
            name,
            f"{STATED_R2[law]:g}",
            *(r2_text(fits[law, total].value if (law, total) in fits else None) for total in TOTALS),
        )
        for law, name in LAWS.items()
        if any((law, total) in fits for total in TOTALS)
    ]
    head = ("law", "R\u00b2 stated", *(f"R\u00b2 {here}, {total}" for total in TOTALS.values()))
    return Table(title, head, tuple(rows), basis_of(list(fits.values()))) if rows else None
