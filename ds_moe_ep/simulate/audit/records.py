"""The audit as Records, audit.<bed>.<figure>.<what>.<stated|derived|simulated>, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.audit.audit import HEAD, AuditRow
from ds_moe_ep.simulate.step.predict import Estimate
from ds_moe_ep.simulate.step.source import PredictionSource

DERIVED = "derived from shapes, peaks and links, not measured"


def audit_records(rows: Sequence[AuditRow], source: PredictionSource) -> Iterator[Record]:
    """Every number of the audit, each column apart."""
    for row in rows:
        figure = row.figure
        start = f"audit.{source.bed}.{figure.key}"
        for number in figure.numbers:
            columns = {
                "stated": (number.stated, f"stated by the specification, section {figure.section}"),
                "derived": (number.derived, DERIVED),
            }
            for column, (value, note) in columns.items():
                if value is not None:
                    name = f"{start}.{number.what}.{column}"
                    yield source.record(name, Estimate.exactly(value), number.unit, note)
        for what, (estimate, unit) in row.numbers.items():
            yield source.record(f"{start}.{what}.simulated", estimate, unit)


def audit_values(rows: Sequence[AuditRow]) -> list[dict[str, Any]]:
    """The audit as plain values: the texts of each column, and the numbers behind them; a bar is [value, low, high]."""
    return [
        {
            **dict(zip(HEAD, row.cells, strict=True)),
            "numbers": {
                "stated": {n.what: [n.stated, n.unit] for n in row.figure.numbers if n.stated is not None},
                "derived": {n.what: [n.derived, n.unit] for n in row.figure.numbers if n.derived is not None},
                "simulated": {
                    what: [[bar.value, bar.low, bar.high], unit] for what, (bar, unit) in row.numbers.items()
                },
            },
        }
        for row in rows
    ]
