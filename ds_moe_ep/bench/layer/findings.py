"""Units and notes of the layer benchmark's samples, the ratios that follow from them, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric, ratios
from ds_moe_ep.bench.layer.ranks import MATMUL, NATIVE, LayerPlan
from ds_moe_ep.records.quantity import cell
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table

TIME_NOTE = "forward and backward, slowest rank, lowest and highest 5 % dropped, quartiles"
METRICS = {
    "time": Metric("ms", f"one layer, {TIME_NOTE}"),
    "ratio": Metric("ratio", f"median of the per-round ratio to native; {TIME_NOTE}"),
    "bytes": Metric("bytes", "rows to other ranks, forward and backward, counted at the process groups; fullest rank"),
    "collective_bytes": Metric("bytes", "payload of the collectives that carry no rows, counted at the process groups"),
    "peak": Metric(
        "bytes", "parameters, tokens, activations, gradients, buffers above the memory before; fullest rank"
    ),
    "difference": Metric(
        "ratio", "largest difference to the first layer, of the largest element: output, loss, gradients"
    ),
}
MATMULS = Metric("ms", f"matrix products of the experts' real rows alone, {TIME_NOTE}")


def metric(name: str) -> Metric:
    """The Metric of a name's last part."""
    *_, candidate, what = name.split(".")
    return MATMULS if (candidate, what) == (MATMUL, "time") else METRICS[what]


def derive(plan: LayerPlan, found: Collector) -> Iterator[DerivedSamples]:
    """Times over the native layer's in the same round."""
    for case in plan.cases:
        native_ms = found.of(f"layer.{case.name}.{NATIVE}.time")
        for name in plan.candidates if native_ms else ():
            if name != NATIVE:
                of = f"layer.{case.name}.{name}"
                yield DerivedSamples(f"{of}.ratio", ratios(found.of(f"{of}.time"), native_ms))


def layer_table(records: Sequence[Record]) -> Table:
    """A row per candidate and case, with the conditions below."""
    of_rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        _, case, name, what = record.name.split(".")
        of_rows.setdefault((case, name), {})[what] = record
    rows = [
        (
            *row,
            cell(found.get("time"), "ms", 1, bar=True),
            cell(found.get("ratio"), "ratio", 2, bar=True),
            cell(found.get("bytes"), "MB", 2),
            cell(found.get("peak"), "MB", 1),
        )
        for row, found in of_rows.items()
    ]
    head = ("case", "candidate", "time, ms", "native = 1", "sent, MB", "peak, MB")
    basis = [f"`{first.command}` at {first.commit} on {first.hardware}." for first in records[:1]]
    title = "Forward + backward of one layer: median (quartiles), slowest rank; bytes per rank"
    return replace(
        table(title, head, rows, *basis, text_columns=2),
        ruled_rows=frozenset(index for index, (row, after) in enumerate(pairwise(rows)) if row[0] != after[0]),
    )
