"""What the ranks of a soak told so far, the Records that follow from it, and the verdicts (names: records/names.py)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.layer.findings import Collected
from ds_moe_ep.bench.soak.plan import SoakPlan
from ds_moe_ep.records.record import Record

SETTLED = 0.25  # of a run: what a process holds is judged by the samples after it
COUNTS = ("handles", "sockets", "threads")
MOMENTS = {
    "start": "before the engine is made",
    "steady": "once settled",
    "end": "at the last step",
    "after": "when the engine and all groups but the world's are gone",
}
# What may be added over a run, by the robust slope of the rank that gains most. Memory is resident pages, which the
# heap scatters; 2 % of it in 1,000 steps is half of one buffer of one layer's rows a step. A tensor that is kept every
# hundredth step is found, and an object every second one.
BOUNDS: Mapping[str, tuple[float, str]] = {
    "memory": (2.0, "%"),
    "allocated": (2.0, "%"),
    "tensors": (10.0, "tensors"),
    "objects": (500.0, "objects"),
}


class SoakFindings(Collected):
    """Collects findings of all runs; `records` may be asked for at any time and covers what is complete."""

    def __init__(self, plan: SoakPlan, num_runs: int, command: str, commit: str, hardware: str) -> None:
        super().__init__(command, commit, hardware)
        self._plan = plan
        self._runs = [f"run{run}" for run in range(1, num_runs + 1)]
        self._hashes: dict[tuple[str, str], str] = {}

    def add(self, finding: Finding) -> None:
        if finding.text:
            self._hashes[finding.case, finding.what] = finding.text
        else:
            super().add(finding)

    def records(self) -> list[Record]:
        """Every record that can be made now: run by run, then the routing, then what all runs say together."""
        found = [record for run in self._runs for record in self._of_run(run)]
        found += [*self._routing(), *self._weather(), *self._losses(), *self._sameness()]
        return [*found, *self._verdicts({record.name: record for record in found})]

    def _of_run(self, run: str) -> Iterator[Record]:
        for step in self._plan.samples():
            if values := self._of(run, f"memory.step{step:05d}"):
                yield self._record(f"{run}.memory.step{step:05d}", values, "bytes", "resident, of the middle rank")
        if values := self._of(run, "memory.peak"):
            yield self._record(f"{run}.peak.memory", values, "bytes", "resident, at a run's fullest moment, bursts too")
        for what, (_, unit) in BOUNDS.items():
            if gains := self._gains(run, what):
                note = f"added over a run by its slope after {SETTLED:.0%} of it (Theil-Sen), of the middle rank"
                yield self._record(f"{run}.growth.{what}", gains, unit, note)
        for what in COUNTS:
            for when, place in self._moments().items():
                if values := self._of(run, f"{what}.{place}"):
                    yield self._record(f"{run}.{what}.{when}", values, what, f"of the middle rank, {MOMENTS[when]}")

    def _gains(self, run: str, what: str) -> list[float]:
        """What each rank gained of `what` over a run: percent of it where it is memory, else a number."""
        steps = [step for step in self._plan.samples() if step > SETTLED * self._plan.steps]
        rows = [(step, values) for step in steps if (values := self._of(run, f"{what}.step{step:05d}"))]
        if len(rows) < max(3, len(steps)):
            return []
        of_ranks = zip(*(values for _, values in rows), strict=True)
        gains = [slope([step for step, _ in rows], of_rank) * self._plan.steps for of_rank in of_ranks]
        if BOUNDS[what][1] != "%":
            return gains
        resident = self._of(run, f"memory.step{steps[0]:05d}")
        return [100 * gain / of_rank for gain, of_rank in zip(gains, resident, strict=True)]

    def _moments(self) -> dict[str, str]:
        """Where the counts of a process are told: before the engine, once settled, at the last step, after the end."""
        samples = self._plan.samples()
        steady = next(step for step in samples if step >= min(100, SETTLED * self._plan.steps))
        return {"start": "start", "steady": f"step{steady:05d}", "end": f"step{samples[-1]:05d}", "after": "after"}

    def _routing(self) -> Iterator[Record]:
        """Of the first run: all runs route alike, or the hashes say so."""
        for step, rows in self._rows().items():
            n, fullest = len(rows), max(rows)
            mean = sum(rows) / n
            yield self._record(f"load.step{step:05d}", [fullest / mean], "ratio", "fullest expert over the mean", n=n)
            note = "the fullest expert of the first layer"
            yield self._record(f"fullest.step{step:05d}", [float(rows.index(fullest))], "expert", note, n=n)

    def _rows(self) -> dict[int, list[float]]:
        """Rows of each expert of the first layer, by step; a step without tokens is left out."""
        of_steps = {step: self._of(self._runs[0], f"rows.step{step:05d}") for step in range(1, self._plan.steps + 1)}
        return {step: rows for step, rows in of_steps.items() if sum(rows)}

    def _weather(self) -> Iterator[Record]:
        plan, rows = self._plan, self._rows()
        if not rows:
            return
        ranks = range(plan.num_ranks)
        bursts = sum(plan.is_burst(step) for step in rows)
        empty = sum(plan.tokens_of(step, rank) == 0 for step in rows for rank in ranks)
        idle = sum(rows_E.count(0) for rows_E in rows.values())
        led = len({rows_E.index(max(rows_E)) for rows_E in rows.values()})
        for what, value, note in (
            ("bursts", bursts, "steps in which all tokens go to one expert"),
            ("empty_batches", empty, "batches of a rank without a token"),
            ("idle_ranks", idle, "times that a rank received no row in the first layer"),
            ("experts_led", led, "experts that were the fullest one at some step"),
        ):
            yield self._record(f"weather.{what}", [float(value)], "count", note, n=len(rows))

    def _losses(self) -> Iterator[Record]:
        for step in self._plan.hashes():
            values = self._of(self._runs[0], f"loss.step{step:05d}")
            if values and math.isfinite(values[0]):
                yield self._record(f"loss.step{step:05d}", values, "nats", "mean of the ranks, balance losses included")

    def _sameness(self) -> Iterator[Record]:
        for step in self._plan.hashes():
            what = f"hash.step{step:05d}"
            hashes = [text for run in self._runs if (text := self._hashes.get((run, what)))]
            if hashes:
                note = f"runs with sha256 {hashes[0][:16]}... of losses, loads and parameters of all ranks until now"
                yield self._record(what, [float(hashes.count(hashes[0]))], "runs", note, n=len(hashes))

    def _verdicts(self, found: Mapping[str, Record]) -> Iterator[Record]:
        for what, (bound, unit) in BOUNDS.items():
            of_runs = [r for run in self._runs if (r := found.get(f"soak.{run}.growth.{what}"))]
            if of_runs:
                most = max(record.spread[1] for record in of_runs)
                note = (
                    f"the rank that gains most gains {most:.2f} {unit} over {self._plan.steps} steps, bound {bound:g}"
                )
                yield self._verdict(what, most <= bound, note, len(of_runs))
        yield from self._verdict_on_handles()
        hashes = [record for name, record in found.items() if name.startswith("soak.hash.")]
        if hashes and hashes[0].n > 1:
            alike = [record.value == record.n for record in hashes]
            note = f"{sum(alike)} of {len(alike)} hashes are equal over {hashes[0].n} runs"
            yield self._verdict("same", all(alike), note, hashes[0].n)
        losses = [values[0] for (_, _, what), values in self._values.items() if what.startswith("loss.")]
        if losses:
            finite = sum(map(math.isfinite, losses))
            yield self._verdict("finite", finite == len(losses), f"{finite} of {len(losses)} losses", len(losses))

    def _verdict_on_handles(self) -> Iterator[Record]:
        moments, worst, n = self._moments(), {"changed": 0.0, "left": 0.0}, 0
        for run in self._runs:
            for what in COUNTS:
                start, steady, end, after = (self._of(run, f"{what}.{step}") for step in moments.values())
                if start and steady and end and after:
                    n += 1
                    worst["changed"] = max(worst["changed"], *(abs(b - a) for a, b in zip(steady, end, strict=True)))
                    worst["left"] = max(worst["left"], *(b - a for a, b in zip(start, after, strict=True)))
        if n:
            note = (
                f"handles, sockets and threads of a rank differ by {worst['changed']:.0f} from {moments['steady']} to "
                f"the last step, and {worst['left']:.0f} are left when the engine and its groups are gone"
            )
            yield self._verdict("handles", not any(worst.values()), note, n)

    def _verdict(self, what: str, holds: bool, note: str, n: int) -> Record:
        return self._record(f"verdict.{what}", [float(holds)], "ratio", note, n=n)

    def _of(self, run: str, what: str) -> list[float]:
        return self._values.get((run, "", what), [])

    def _record(self, name: str, values: Sequence[float], unit: str, notes: str, n: int = 0) -> Record:
        """The middle of the values between the least and the most."""
        return Record(
            name=f"soak.{name}",
            value=statistics.median(values),
            unit=unit,
            spread=(min(values), max(values)),
            n=n or len(values),
            emulated=False,
            notes=notes,
            **self._source,
        )


def slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs (Theil and Sen): one jump does not move it."""
    pairs = [(i, j) for j in range(len(steps)) for i in range(j)]
    return statistics.median((values[j] - values[i]) / (steps[j] - steps[i]) for i, j in pairs)
