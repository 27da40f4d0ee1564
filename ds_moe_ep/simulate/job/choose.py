"""Which schedule `auto` would take on a cluster: the tuner's candidates, priced by the simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule import price
from ds_moe_ep.schedule.build import pieces_of
from ds_moe_ep.schedule.program import START, Program
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.setup import Setup

TIE = 1e-3  # of the lowest price: what is closer counts as equal, and fewer pieces are better

Choice = tuple[float, Mapping[str, Any]]


def choose_schedule(setup: Setup) -> list[Choice]:
    """(microseconds of a layer's forward and backward pass through its experts, knobs) of each candidate, in order."""
    torus = EpJob(setup).torus
    may_copy = setup.moe.two_level != "auto" or setup.moe.top_k > 1  # one row per token is a copy as it is
    candidates = price.candidates(torus, setup.moe.two_level if may_copy else "off")
    priced: list[Choice] = [(layer_us(with_knobs(setup, knobs)), knobs) for knobs in candidates]
    return in_order(priced, setup, torus)


def in_order(priced: list[Choice], setup: Setup, torus: Torus) -> list[Choice]:
    """The cheapest first; of equal ones that with the fewest pieces, whose small products and messages are fewest."""
    step_us = max(TIE * min(time_us for time_us, _ in priced), 1e-9)

    def order(choice: Choice) -> tuple[int, int]:
        moe = dataclasses.replace(setup.moe, **choice[1])
        return round(choice[0] / step_us), len(pieces_of(moe, torus))

    return sorted(priced, key=order)


def with_knobs(setup: Setup, knobs: Mapping[str, Any]) -> Setup:
    """The same job under another schedule."""
    return dataclasses.replace(setup, moe=dataclasses.replace(setup.moe, **knobs))


def as_auto(setup: Setup) -> Setup:
    """The job with the schedule that `auto` would take; as it is where its schedule is named."""
    return with_knobs(setup, choose_schedule(setup)[0][1]) if setup.moe.schedule == "auto" else setup


def layer_us(setup: Setup) -> float:
    """Microseconds of one layer's rows, there and back, through its experts: forward, and backward where it trains."""
    job = EpJob(setup)
    total_us = 0.0
    passes = [job.layer.forward] + ([job.layer.backward] if setup.mode == "training" else [])
    for add in passes:
        program = Program()
        add(program, START, "layer")
        total_us += program.run(job.machine.capacities).makespan_us
    return total_us
