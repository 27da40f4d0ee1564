"""Units and notes of a soak's samples, and the verdicts that follow from them (names: records/names.py)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.records.quantity import Quantity, number, percent
from tests.soak.plan import SETTLED, SoakPlan

COUNTS = ("handles", "sockets", "threads")
MOMENTS = {
    "start": "before the engine is made",
    "steady": "once settled",
    "end": "at the last step",
    "after": "when the engine and all groups but the world's are gone",
}
# What may be added over a run, by the robust slope of the rank that gains most. Memory is resident pages, which the
# heap scatters; 2 % of it in 1,000 steps is half of one buffer of one layer's rows per step. A tensor kept every
# hundredth step is found, and an object every second one.
BOUNDS: Mapping[str, tuple[float, str]] = {
    "memory": (2.0, "%"),
    "allocated": (2.0, "%"),
    "tensors": (10.0, "tensors"),
    "objects": (500.0, "objects"),
}
OF_RUN = {
    "memory": Metric("bytes", "resident, of the middle rank"),
    "peak": Metric("bytes", "resident, at a run's fullest moment, bursts too"),
    "growth": Metric(
        "%", f"added over a run by its slope after {percent(SETTLED, 0)} of it (Theil-Sen), of the middle rank"
    ),
    **{count: Metric(count, "") for count in COUNTS},
}
OF_ALL = {
    "load": Metric("ratio", "fullest expert over the mean"),
    "fullest": Metric("expert", "the fullest expert of the first layer"),
    "weather": Metric("count", ""),
    "loss": Metric("nats", "mean of the ranks, balance losses included"),
    "hash": Metric("runs", ""),
    "verdict": Metric("ratio", ""),
}


def metric(name: str) -> Metric | None:
    """The Metric of a name; None for what growth, loads and hashes are made of."""
    _, first, *rest = name.split(".")
    if not first.startswith("run"):
        return OF_ALL[first]
    if rest[0] in COUNTS:
        return Metric(rest[0], f"of the middle rank, {MOMENTS[rest[1]]}")
    return OF_RUN.get(rest[0])


def extremes(values: Sequence[float]) -> Quantity:
    """The middle of the values between the least and the most."""
    return Quantity("", "", "", statistics.median(values), min(values), max(values), len(values))


def derive(plan: SoakPlan, num_runs: int, found: Collector) -> Iterator[DerivedSamples]:
    """Growth run by run, then the routing, then what all runs say together."""
    runs = [f"soak.run{run}" for run in range(1, num_runs + 1)]
    growth = {(run, what): gains for run in runs for what in BOUNDS if (gains := gains_of(plan, found, run, what))}
    for (run, what), gains in growth.items():
        yield DerivedSamples(f"{run}.growth.{what}", gains, unit=BOUNDS[what][1])
    rows = rows_of(plan, found, runs[0])
    yield from _routing(plan, rows)
    for step in plan.hashes():
        losses = found.of(f"{runs[0]}.loss.step{step:05d}")
        if losses and math.isfinite(losses[0]):
            yield DerivedSamples(f"soak.loss.step{step:05d}", losses)
    sameness = list(_sameness(plan, runs, found))
    yield from sameness
    for what, (bound, unit) in BOUNDS.items():
        if of_runs := [max(gains) for (_, its), gains in growth.items() if its == what]:
            most = max(of_runs)
            note = f"the rank that gains most gains {number(most, 2)} {unit} over {plan.steps} steps, bound {bound:g}"
            yield _verdict(what, most <= bound, note, len(of_runs))
    yield from _verdict_on_handles(plan, runs, found)
    if sameness and sameness[0].n > 1:
        alike, num_told = [one.values[0] == one.n for one in sameness], sameness[0].n
        note = f"{sum(alike)} of {len(alike)} hashes are equal over {num_told} runs"
        yield _verdict("same", all(alike), note, num_told)
    losses = [values[0] for name, values in found.samples.items() if name.split(".")[2] == "loss"]
    if losses:
        finite = sum(map(math.isfinite, losses))
        yield _verdict("finite", finite == len(losses), f"{finite} of {len(losses)} losses", len(losses))


def gains_of(plan: SoakPlan, found: Collector, run: str, what: str) -> list[float]:
    """Gains of each rank over a run: percent of it where it is memory, else a number."""
    steps = [step for step in plan.samples() if step > SETTLED * plan.steps]
    rows = [(step, values) for step in steps if (values := found.of(f"{run}.{what}.step{step:05d}"))]
    if len(rows) < max(3, len(steps)):
        return []
    of_ranks = zip(*(values for _, values in rows), strict=True)
    gains = [slope([step for step, _ in rows], of_rank) * plan.steps for of_rank in of_ranks]
    if BOUNDS[what][1] != "%":
        return gains
    resident = found.of(f"{run}.memory.step{steps[0]:05d}")
    return [100 * gain / of_rank for gain, of_rank in zip(gains, resident, strict=True)]


def rows_of(plan: SoakPlan, found: Collector, run: str) -> dict[int, list[float]]:
    """Rows of each expert of the first layer, by step; a step without tokens is left out."""
    of_steps = {step: found.of(f"{run}.rows.step{step:05d}") for step in range(1, plan.steps + 1)}
    return {step: rows for step, rows in of_steps.items() if sum(rows)}


def _routing(plan: SoakPlan, rows: Mapping[int, list[float]]) -> Iterator[DerivedSamples]:
    """Of the first run: all runs route alike, or the hashes say so."""
    for step, rows_E in rows.items():
        n, fullest = len(rows_E), max(rows_E)
        yield DerivedSamples(f"soak.load.step{step:05d}", [fullest * n / sum(rows_E)], n=n)
        yield DerivedSamples(f"soak.fullest.step{step:05d}", [float(rows_E.index(fullest))], n=n)
    if not rows:
        return
    bursts = sum(plan.is_burst(step) for step in rows)
    empty = sum(plan.tokens_of(step, rank) == 0 for step in rows for rank in range(plan.num_ranks))
    idle = sum(rows_E.count(0) for rows_E in rows.values())
    led = len({rows_E.index(max(rows_E)) for rows_E in rows.values()})
    for what, value, note in (
        ("bursts", bursts, "steps in which all tokens go to one expert"),
        ("empty_batches", empty, "batches of a rank without a token"),
        ("idle_ranks", idle, "times that a rank received no row in the first layer"),
        ("experts_led", led, "experts that were the fullest one at some step"),
    ):
        yield DerivedSamples(f"soak.weather.{what}", [float(value)], note, n=len(rows))


def _sameness(plan: SoakPlan, runs: Sequence[str], found: Collector) -> Iterator[DerivedSamples]:
    for step in plan.hashes():
        hashes = [text for run in runs for text in found.texts.get(f"{run}.hash.step{step:05d}", [])]
        if hashes:
            note = f"runs with sha256 {hashes[0][:16]}... of losses, loads and parameters of all ranks until now"
            yield DerivedSamples(f"soak.hash.step{step:05d}", [float(hashes.count(hashes[0]))], note, n=len(hashes))


def _verdict_on_handles(plan: SoakPlan, runs: Sequence[str], found: Collector) -> Iterator[DerivedSamples]:
    worst, n = {"changed": 0.0, "left": 0.0}, 0
    for run in runs:
        for what in COUNTS:
            start, steady, end, after = (found.of(f"{run}.{what}.{when}") for when in MOMENTS)
            if start and steady and end and after:
                n += 1
                worst["changed"] = max(worst["changed"], *(abs(b - a) for a, b in zip(steady, end, strict=True)))
                worst["left"] = max(worst["left"], *(b - a for a, b in zip(start, after, strict=True)))
    if n:
        note = (
            f"handles, sockets and threads of a rank differ by {number(worst['changed'], 0)} from "
            f"step{plan.steady_step:05d} to the last step, and {number(worst['left'], 0)} are left when the engine and "
            "its groups are gone"
        )
        yield _verdict("handles", not any(worst.values()), note, n)


def _verdict(what: str, holds: bool, note: str, n: int) -> DerivedSamples:
    return DerivedSamples(f"soak.verdict.{what}", [float(holds)], note, n=n)


def slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs (Theil and Sen): one jump does not move it."""
    pairs = [(i, j) for j in range(len(steps)) for i in range(j)]
    return statistics.median((values[j] - values[i]) / (steps[j] - steps[i]) for i, j in pairs)
