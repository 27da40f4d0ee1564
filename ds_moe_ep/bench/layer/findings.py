"""What the ranks told so far, and the Records that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ds_moe_ep.bench.harness.method import Round, ratios, summarize, times_of
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.layer.ranks import MATMUL, NATIVE, LayerPlan
from ds_moe_ep.records.record import Record

TIME_NOTE = "forward and backward, slowest rank, lowest and highest 5 % dropped, quartiles"
NOTES = {
    "ratio": f"median of the per-round ratio to native; {TIME_NOTE}",
    "bytes": "rows to other ranks, forward and backward, counted at the process groups; most of a rank",
    "collective_bytes": "payload of the collectives that carry no rows, counted at the process groups",
    "peak": "parameters, tokens, activations, gradients, buffers above the memory before; most of a rank",
    "difference": "largest difference to the first side, of the largest element: output, loss, gradients",
}
UNITS = {"bytes": "bytes", "collective_bytes": "bytes", "peak": "bytes", "difference": "ratio"}


class Collected:
    """Findings as they come, and where they come from."""

    def __init__(self, command: str, commit: str, hardware: str) -> None:
        self._source = {"command": command, "commit": commit, "hardware": hardware}
        self._values: dict[tuple[str, str, str], list[float]] = {}

    def add(self, finding: Finding) -> None:
        self._values.setdefault((finding.case, finding.side, finding.what), []).extend(finding.values)


class LayerFindings(Collected):
    """Collects findings; `records` may be asked for at any time and covers what is complete."""

    def __init__(self, plan: LayerPlan, command: str, commit: str, hardware: str) -> None:
        super().__init__(command, commit, hardware)
        self._plan = plan

    def records(self) -> list[Record]:
        """Every record that can be made now, case by case and side by side."""
        return [
            record
            for case in self._plan.cases
            for side in self._plan.sides
            for record in self._side_records(case.name, side)
        ]

    def _side_records(self, case: str, side: str) -> Iterator[Record]:
        rounds = self._rounds(case)
        if rounds:
            note = "matrix products of the experts' real rows alone" if side == MATMUL else "one layer"
            milliseconds = [seconds * 1e3 for seconds in times_of(rounds, side)]
            yield self._record(f"layer.{case}.{side}.time", milliseconds, "ms", f"{note}, {TIME_NOTE}")
            if NATIVE in self._plan.sides and side != NATIVE:
                to_native = ratios(rounds, side, NATIVE)
                yield self._record(f"layer.{case}.{side}.ratio", to_native, "ratio", NOTES["ratio"])
        for what, unit in UNITS.items():
            values = self._values.get((case, side, what), [])
            if values:
                yield self._record(f"layer.{case}.{side}.{what}", values, unit, NOTES[what])

    def _rounds(self, case: str) -> list[Round]:
        """The rounds that every side has finished."""
        columns = [self._values.get((case, side, "time"), []) for side in self._plan.sides]
        return [dict(zip(self._plan.sides, times, strict=True)) for times in zip(*columns, strict=False)]

    def _record(self, name: str, values: Sequence[float], unit: str, notes: str) -> Record:
        summary = summarize(values)
        return Record(
            name=name,
            value=summary.median,
            unit=unit,
            spread=(summary.low, summary.high),
            n=summary.n,
            emulated=False,
            notes=notes,
            **self._source,
        )
