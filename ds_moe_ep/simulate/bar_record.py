"""A simulated number as a Record: its spread is what comes out at both ends of the cluster's ranges."""

from __future__ import annotations

from ds_moe_ep.record import Record
from ds_moe_ep.simulate.predict import Estimate
from ds_moe_ep.simulate.records import Source


def bar_record(source: Source, name: str, estimate: Estimate, unit: str, notes: str, n: int = 1) -> Record:
    """The Record of `name`, which `source` made."""
    return Record(
        name=name,
        value=estimate.value,
        unit=unit,
        spread=(estimate.low, estimate.high),
        n=n,
        command=source.command,
        commit=source.commit,
        hardware=source.hardware,
        emulated=True,
        notes=notes,
    )


def exactly(value: float) -> Estimate:
    """A number that no range of the cluster changes."""
    return Estimate(value, value, value)
