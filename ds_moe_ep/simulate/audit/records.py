"""The audit as Records, audit.<place>.<figure>.<what>.<stated|derived|simulated>, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.audit.audit import HEAD, AuditRow
from ds_moe_ep.simulate.step.source import PredictionSource

DERIVED = "derived from shapes, peaks and links, not measured"


def audit_records(rows: Sequence[AuditRow], source: PredictionSource) -> Iterator[Record]:
    """Every number of the audit, each column apart."""
    for row in rows:
        start = f"audit.{source.environment}.{row.figure.key}"
        notes = {"stated": f"stated by the specification, section {row.figure.section}", "derived": DERIVED}
        for number in row.figure.numbers:
            for column, note in notes.items():
                value = getattr(number, column)
                if value is not None:
                    found = Quantity.of(value, unit=number.unit, name=f"{number.what}.{column}", note=note)
                    yield source.record(found, start)
        yield from source.records(start, (its.named(f"{name}.simulated") for name, its in row.numbers.items()))


def audit_values(rows: Sequence[AuditRow]) -> list[dict[str, Any]]:
    """The audit as plain values: the texts of each column, and the numbers behind them; a bar is [value, low, high]."""
    return [{**dict(zip(HEAD, row.cells, strict=True)), "numbers": _numbers(row)} for row in rows]


def _numbers(row: AuditRow) -> dict[str, Any]:
    stated = {n.what: [n.stated, n.unit] for n in row.figure.numbers if n.stated is not None}
    derived = {n.what: [n.derived, n.unit] for n in row.figure.numbers if n.derived is not None}
    simulated = {name: [its.bar, its.unit] for name, its in row.numbers.items()}
    return {"stated": stated, "derived": derived, "simulated": simulated}
