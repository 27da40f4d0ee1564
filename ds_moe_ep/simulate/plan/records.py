"""Plans as Records and spans, as measured runs have them, on an environment that is called simulated; and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import title_of
from ds_moe_ep.records.record import Record, write_whole
from ds_moe_ep.schedule.build import OpKind
from ds_moe_ep.schedule.spans import LANES, NEAR_LANES, Span, Tags, write_spans
from ds_moe_ep.simulate.plan.plan import MEMORY, Comparison, Plan
from ds_moe_ep.simulate.step.predict import Prediction
from ds_moe_ep.simulate.step.source import PredictionSource

RECORDED = {"tps", "tpot", "step", "busy", "hidden"}  # of the headline, as of a measured system
REPEATED = "recompute"  # phase of a forward pass that the backward pass repeats


def plan_records(plan: Plan, source: PredictionSource) -> Iterator[Record]:
    """The plan of one job, and of its serial twin; memory, where it trains."""
    start, system = _start(plan, source), plan.system
    trains = plan.job.setup.mode == "training"
    mine = [quantity for quantity in plan.quantities if trains or not quantity.name.startswith(MEMORY)]
    for name, quantities in ((system, mine), (f"{system}_serial", plan.serial_quantities)):
        its = [quantity for quantity in quantities if quantity.name in RECORDED or "." in quantity.name]
        yield from source.records(f"{start}.{name}", its)
    if plan.serial is not None:
        yield from _ratios(source, start, (system, plan.prediction), (f"{system}_serial", plan.serial))


def _start(plan: Plan, source: PredictionSource) -> str:
    """Begin of the names of a plan's Records, those of measured systems likewise."""
    return f"system.{source.environment}.{plan.job.setup.mode}"


def comparison_records(comparison: Comparison, source: PredictionSource) -> Iterator[Record]:
    """Both plans and the ratios of their throughputs, the serial twin's too.

    Raises ConfigError for two jobs of one name: their Records would replace each other.
    """
    ours, theirs = comparison.ours, comparison.theirs
    if ours.system == theirs.system:
        raise ConfigError(
            f"compare={theirs.job.path}: both jobs are {title_of(ours.system)}, and Records are named for it; write "
            "them into two files, one plan each"
        )
    yield from plan_records(ours, source)
    yield from plan_records(theirs, source)
    start = _start(ours, source)
    yield from _ratios(source, start, (ours.system, ours.prediction), (theirs.system, theirs.prediction))
    if ours.serial is not None:
        serial = f"{ours.system}_serial", ours.serial
        yield from _ratios(source, start, serial, (theirs.system, theirs.prediction))


Named = tuple[str, Prediction]


def _ratios(source: PredictionSource, start: str, *both: Named) -> Iterator[Record]:
    """Each over the other, at the same end."""
    for (system, prediction), (other, its) in (both, both[::-1]):
        yield source.record(prediction.over(its).named(f"ratio_to_{other}"), f"{start}.{system}")


def plan_spans(plan: Plan) -> list[Span]:
    """One micro-batch of the job and of its serial twin, as the report's timeline of experts' rows expects it.

    What concerns rows and experts has its layer named for its system, and a forward pass that is repeated is a phase of
    its own. Spans of a layout keep their names.
    """
    if plan.job.setup.training.layout != WHOLE:
        return list(plan.prediction.step.spans)
    twins = [(plan.system, plan.prediction)]
    if plan.serial is not None:
        twins.append((f"{plan.system}_serial", plan.serial))
    return [span for system, prediction in twins for span in _named(prediction.step.spans, system)]


def _named(spans: Sequence[Span], system: str) -> Iterator[Span]:
    turn_us = min((span.start_us for span in spans if span.tags.phase == "backward"), default=math.inf)
    for span in spans:
        tags = span.tags
        of_experts = span.lane in (*LANES, *NEAR_LANES) and (tags.peers or span.name.startswith(OpKind.WEIGHTS.value))
        layer = f"{system}/{tags.layer}" if of_experts else tags.layer
        phase = REPEATED if tags.phase == "forward" and span.start_us >= turn_us else tags.phase
        yield dataclasses.replace(span, tags=Tags(layer, phase, tags.peers))


def write_plan(path: Path, records: Sequence[Record], plan: Plan) -> None:
    """Replaces the file of Records, and the spans of the plan beside it, x.spans.jsonl of x.jsonl."""
    write_whole(records, path)
    write_spans(path.with_name(path.name.removesuffix(".jsonl") + ".spans.jsonl"), plan_spans(plan))
