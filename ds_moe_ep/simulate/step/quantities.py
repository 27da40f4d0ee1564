"""The numbers of a prediction, by name: what tables, JSON and Records are made from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ds_moe_ep.records.names import PARTS, SIMULATED_PARTS
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.simulate.step.predict import Prediction
from ds_moe_ep.simulate.step.setup import Step

EXPOSED = (
    "experts_traffic",
    "tensor_traffic",
    *SIMULATED_PARTS,
)  # parts of a step in which rows or tokens travel and nothing computes


def headline(prediction: Prediction) -> Iterator[Quantity]:
    """Throughput, times of a step, and shares of it."""
    yield prediction.tps.named("tps", "tokens per second")
    yield prediction.estimate(lambda step: step.tpot_us).named("tpot", "time per token", "us")
    yield prediction.estimate(lambda step: step.step_us).scaled(1e-3).named("step", "time per step", "ms")
    yield prediction.estimate(lambda step: step.mfu).scaled(100).named("mfu", "model-flop utilization", "%")
    yield prediction.estimate(lambda step: step.busy).scaled(100).named("busy", "device busy", "%")
    exposed = prediction.estimate(lambda step: sum(_of_part(step, part) for part in EXPOSED))
    yield exposed.scaled(1e-3).named("exposed", "exposed communication", "ms")
    if prediction.hidden is not None:
        traffic = prediction.estimate(lambda step: step.traffic_us)
        yield traffic.scaled(1e-3).named("traffic", "experts' traffic", "ms")
        yield prediction.hidden.scaled(100).named("hidden", "of it hidden behind compute", "%")


def breakdown(prediction: Prediction) -> Iterator[Quantity]:
    """The parts that sum to a step, those that take no time left out."""
    for part, title in {**PARTS, **SIMULATED_PARTS}.items():
        if prediction.step.parts_us.get(part):
            yield prediction.estimate(partial(_of_part, part=part)).scaled(1e-3).named(part, title, "ms")


def _of_part(step: Step, part: str) -> float:
    return step.parts_us.get(part, 0.0)
