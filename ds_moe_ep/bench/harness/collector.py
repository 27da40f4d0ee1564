"""Samples by the names of their Records as ranks tell them, and the Quantities and Records that follow.

A name that a benchmark has no Metric for is an ingredient of others and makes no Record itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.records.record import Record


@dataclass(frozen=True)
class Metric:
    """How samples of a kind are recorded."""

    unit: str
    note: str
    is_emulated: bool = False


@dataclass(frozen=True)
class DerivedSamples:
    """Samples that follow from others, with a note of their own where the Metric's says too little."""

    name: str
    values: Sequence[float]
    note: str = ""
    n: int = 0  # samples behind the values, where these are fewer
    unit: str = ""


class Collector:
    """Findings as they come; its Quantities and Records may be asked for at any time, Records with a provenance."""

    def __init__(
        self,
        provenance: Provenance | None,
        metric: Callable[[str], Metric | None],
        derive: Callable[[Collector], Iterable[DerivedSamples]] = lambda collector: (),
        summary: Callable[[Sequence[float]], Quantity] = summarize,
    ) -> None:
        self.samples: dict[str, list[float]] = {}
        self.texts: dict[str, list[str]] = {}
        self._provenance, self._metric, self._derive, self._summary = provenance, metric, derive, summary

    def add(self, finding: Finding) -> None:
        """Takes samples, or a text under its kind."""
        for name, values in finding.samples.items():
            self.samples.setdefault(name, []).extend(values)
        if finding.text:
            self.texts.setdefault(finding.kind, []).append(finding.text)

    def of(self, name: str) -> list[float]:
        """The samples of a name; none where there are none yet."""
        return self.samples.get(name, [])

    def quantities(self) -> list[Quantity]:
        """Every number that can be told now: those of samples, then those that follow from them."""
        return [quantity for quantity, _ in self._summarized()]

    def records(self) -> list[Record]:
        """The numbers as Records."""
        assert self._provenance is not None
        hardware = "; ".join((self._provenance.hardware, *self.texts.get("device", ())))
        provenance = dataclasses.replace(self._provenance, hardware=hardware)
        return [
            dataclasses.replace(provenance, emulated=metric.is_emulated).record(quantity)
            for quantity, metric in self._summarized()
        ]

    def _summarized(self) -> Iterator[tuple[Quantity, Metric]]:
        """Each number with its spread: the one place where samples are summarized."""
        told = (DerivedSamples(name, values) for name, values in self.samples.items())
        for one in (*told, *self._derive(self)):
            metric = self._metric(one.name)
            if metric is not None and one.values:
                found = self._summary(one.values)
                number = found.named(one.name, unit=one.unit or metric.unit)
                yield dataclasses.replace(number, n=one.n or found.n, note=one.note or metric.note), metric


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """`mine` over `theirs`, round by round."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]
