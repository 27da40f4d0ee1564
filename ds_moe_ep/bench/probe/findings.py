"""What the ranks of the probe told so far, and the Records that follow from it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.layer.findings import Collected
from ds_moe_ep.records.record import Record

SPREAD = "median and quartiles of samples; on GPUs, and between ranks, a sample is the slowest rank's"
NOTES = {
    "matmul": "the two products of an expert, 4*R*D*F operations",
    "attention": "causal attention of one sequence, forward and backward, 3.5 times 2*S*S*D operations",
    "memory": "an elementwise operation on fp32, bytes read and written",
    "launch": "the host issues a small kernel",
    "sync": "the host reads a number that a kernel has just made",
    "near": "ranks of one node send and receive at once; bytes one way",
    "far": "ranks of two nodes send and receive at once; bytes one way",
    "host": "core time of a message, both ends, of all threads",
}
COUNTED = {
    "senders": "ranks of a node that send at once where all pairs do",
    "cores": "processor cores that the ranks share",
}


class ProbeFindings(Collected):
    """Collects findings; `records` may be asked for at any time."""

    def __init__(self, command: str, commit: str, hardware: str, *, is_shaped: bool) -> None:
        super().__init__(command, commit, hardware)
        self._is_shaped = is_shaped

    def add(self, finding: Finding) -> None:
        """Takes samples, and what the ranks say of themselves."""
        if finding.what == "device":
            self._source["hardware"] += f"; {finding.text}"
        else:
            super().add(finding)

    def records(self) -> list[Record]:
        """A Record of everything that has samples, in the order in which it was measured."""
        found = []
        for (case, _, unit), values in self._values.items():
            summary, kind, what = summarize(values), case.split(".")[0], case.rsplit(".", 1)[-1]
            found.append(
                Record(
                    name=f"probe.{case}",
                    value=summary.median,
                    unit=unit,
                    spread=(summary.low, summary.high),
                    n=summary.n,
                    emulated=self._is_shaped and kind in ("near", "far"),
                    notes=COUNTED.get(what, f"{NOTES[kind]}; {SPREAD}"),
                    **self._source,
                )
            )
        return found


def probe_table(records: Iterable[Record]) -> Table:
    """All Records, a line each."""
    table = Table(title="What one device and its links do: median (quartiles)")
    for column in ("what", "value", "quartiles", "unit", "samples"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right", no_wrap=True)
    for record in records:
        low, high = record.spread
        quartiles = f"{low:,.4g} to {high:,.4g}" if low < high else ""
        name = record.name.removeprefix("probe.")
        table.add_row(name, f"{record.value:,.4g}", quartiles, record.unit, str(record.n))
    return table
