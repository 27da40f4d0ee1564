"""The numbers of a prediction by name, each with its unit and bar: what tables, JSON and Records are made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ds_moe_ep.records.names import PARTS
from ds_moe_ep.simulate.step.predict import Estimate, Prediction
from ds_moe_ep.simulate.step.setup import Step

EXPOSED = ("experts_traffic", "tensor_traffic")  # parts of a step in which rows or tokens travel and nothing computes


@dataclass(frozen=True)
class Measure:
    """One number: `name` as evidence has it where it does, `title` for people."""

    name: str
    title: str
    unit: str
    estimate: Estimate


def measures(prediction: Prediction) -> Iterator[Measure]:
    """The headline of a prediction. Times are of a step, `busy` and `mfu` shares of it."""
    yield Measure("tps", "tokens a second", "tokens/s", prediction.tps)
    yield Measure("tpot", "time a token", "us", prediction.estimate(lambda step: step.tpot_us))
    yield Measure("step", "time a step", "ms", prediction.step_us.scaled(1e-3))
    yield Measure("mfu", "model-flop utilization", "%", prediction.estimate(lambda step: step.mfu).scaled(100))
    yield Measure("busy", "device busy", "%", prediction.estimate(lambda step: step.busy).scaled(100))
    exposed = prediction.estimate(lambda step: sum(_of_part(step, part) for part in EXPOSED))
    yield Measure("exposed", "exposed communication", "ms", exposed.scaled(1e-3))
    if prediction.hidden is not None:
        traffic = prediction.estimate(lambda step: step.traffic_us)
        yield Measure("traffic", "experts' traffic", "ms", traffic.scaled(1e-3))
        yield Measure("hidden", "of it hidden behind compute", "%", prediction.hidden.scaled(100))


def parts(prediction: Prediction) -> Iterator[Measure]:
    """The parts that sum to a step, those that take no time left out."""
    for part, title in PARTS.items():
        if prediction.step.parts_us.get(part):
            yield Measure(part, title, "ms", prediction.estimate(partial(_of_part, part=part)).scaled(1e-3))


def _of_part(step: Step, part: str) -> float:
    return step.parts_us.get(part, 0.0)
