"""A sweep as Records, by the names of `records/names.py`, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.step.source import PredictionSource
from ds_moe_ep.simulate.sweep.sweep import UNITS, Sweep
from ds_moe_ep.specification.laws import STATED_R2


def sweep_records(sweep: Sweep, source: PredictionSource) -> Iterator[Record]:
    """Every point, and the laws' fits to them."""
    for total in TOTALS:
        start = f"sweep.{source.environment}.{total}"
        for point in sweep.of(total):
            yield from source.records(f"{start}.ep{point.ep}.dp{point.dp}", point.quantities.values())
        sizes = ", ".join(str(size) for size in sorted({point.ep for point in sweep.of(total)}))
        note = f"least squares over what is simulated at EP = {sizes}"
        for its in sweep.law_fits(total):
            values = {"coefficient": (its.coefficient, UNITS[its.law]), "r2": (its.r2, "ratio")}
            for name, (value, unit) in values.items():
                if value is not None:
                    found = Quantity.of(value, unit=unit, name=name, note=note)
                    yield source.record(replace(found, n=its.n), f"{start}.fit.{its.law}")


def sweep_values(found: Sweep) -> dict[str, Any]:
    """The sweep as plain values, for JSON; a bar is [value, low, high]."""
    points = [
        {
            "held_constant": point.total,
            "ep": point.ep,
            "dp": point.dp,
            "num_nodes": point.setup.cluster.num_nodes,
            "num_experts": point.setup.moe.num_experts,
            "schedule": point.schedule,
            "memory_bytes": point.memory.peak,
            "fits": point.fits,
            "hidden_ratio": point.prediction.step.hidden,
            "mfu_ratio": point.prediction.step.mfu,
            **{law: point.value(law).bar for law in LAWS},
        }
        for point in found.points
    ]
    fits = [
        {"held_constant": total, **vars(its), "r2_stated": STATED_R2[its.law]}
        for total in TOTALS
        for its in found.law_fits(total)
    ]
    return {"units": UNITS, "points": points, "fits": fits, "notes": list(found.notes)}
