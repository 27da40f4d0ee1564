"""A sweep as Records, by the names of `evidence`, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.step.predict import Estimate
from ds_moe_ep.simulate.step.source import COUNTED, NOTE, PredictionSource
from ds_moe_ep.simulate.sweep.sweep import Sweep, SweepPoint
from ds_moe_ep.specification.laws import STATED_R2

UNITS = {"tps": "tokens/s", "tpot": "us", "busy": "ratio", "memory_per_expert": "bytes"}  # of the laws' values


def sweep_records(sweep: Sweep, source: PredictionSource) -> Iterator[Record]:
    """Every point, and the laws' fits to them."""
    for total in TOTALS:
        start = f"sweep.{source.bed}.{total}"
        for point in sweep.of(total):
            yield from _point(point, f"{start}.ep{point.ep}.dp{point.dp}", source)
        fits = sweep.law_fits(total)
        sizes = ", ".join(str(size) for size in sorted({point.ep for point in sweep.of(total)}))
        note = f"least squares over what is simulated at EP = {sizes}"
        for its in fits:
            name = f"{start}.fit.{its.law}"
            yield source.record(f"{name}.coefficient", Estimate.exactly(its.coefficient), UNITS[its.law], note, its.n)
            if its.r2 is not None:
                yield source.record(f"{name}.r2", Estimate.exactly(its.r2), "ratio", note, its.n)


def _point(point: SweepPoint, start: str, source: PredictionSource) -> Iterator[Record]:
    prediction, cluster = point.prediction, point.setup.cluster
    schedule = f"; schedule {schedule_of(point)}" if point.ep > 1 else ""
    where = f"{NOTE}; {cluster.num_nodes} nodes of {cluster.node_size}{schedule}"
    for law in LAWS:
        notes = COUNTED if law == "memory_per_expert" else where
        yield source.record(f"{start}.{law}", point.value(law), UNITS[law], notes)
    mfu = prediction.estimate(lambda step: step.mfu)
    yield source.record(f"{start}.mfu", mfu, "ratio", where)
    if prediction.hidden is not None:
        yield source.record(f"{start}.hidden", prediction.hidden, "ratio", where)
    fits = "fits" if point.fits else "does not fit, and times are of devices with enough"
    yield source.record(f"{start}.memory", Estimate.exactly(float(point.memory.peak)), "bytes", f"{COUNTED}; {fits}")


def schedule_of(point: SweepPoint) -> str:
    """The schedule of a point in few words: `serial`, `4 chunks`, `peers` of a node, `peers of 64`, `peers x 2`."""
    moe = point.setup.moe
    if moe.is_serial or moe.schedule == "chunks":
        return "serial" if moe.is_serial else f"{moe.chunks} chunks"
    size = f" of {moe.peer_group_size}" if moe.peer_group_size else ""
    return f"peers{size}" + (f" x {moe.row_cuts}" if moe.row_cuts > 1 else "")


def sweep_values(found: Sweep) -> dict[str, Any]:
    """The sweep as plain values, for JSON; a bar is [value, low, high]."""
    points = [
        {
            "held_constant": point.total,
            "ep": point.ep,
            "dp": point.dp,
            "num_nodes": point.setup.cluster.num_nodes,
            "num_experts": point.setup.moe.num_experts,
            "schedule": schedule_of(point),
            "memory_bytes": point.memory.peak,
            "fits": point.fits,
            "hidden_ratio": point.prediction.step.hidden,
            "mfu_ratio": point.prediction.step.mfu,
            **{law: [bar.value, bar.low, bar.high] for law in LAWS for bar in (point.value(law),)},
        }
        for point in found.points
    ]
    fits = [
        {"held_constant": total, **vars(its), "r2_stated": STATED_R2[its.law]}
        for total in TOTALS
        for its in found.law_fits(total)
    ]
    return {"units": UNITS, "points": points, "fits": fits, "notes": list(found.notes)}
