"""Predictions: bars, ratios, and a pipeline of many micro-batches that is simulated in few."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ds_moe_ep.config.knobs import Layout
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.simulate.cluster.cluster import load_cluster
from ds_moe_ep.simulate.job.job import Mode, read_job
from ds_moe_ep.simulate.step.pipeline_step import pipeline_step
from ds_moe_ep.simulate.step.predict import simulate_step
from ds_moe_ep.simulate.step.setup import Setup

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def setup_of(tp_size: int, pp_size: int, micro_batches: int, mode: Mode = "training") -> Setup:
    setup = read_job(CONFIGS / "tp8_pp2.json", load_cluster(CONFIGS / "clusters" / "h100_4x4.json"), mode=mode).setup
    layout = Layout(tp_size=tp_size, pp_size=pp_size)
    training = dataclasses.replace(setup.training, micro_batch=1, accumulation=micro_batches, layout=layout)
    return dataclasses.replace(setup, training=training)


@pytest.mark.parametrize("mode", ["training", "forward"])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(8, 2), (4, 4), (16, 1), (4, 2)])
def test_many_micro_batches_take_what_one_more_takes_each(tp_size: int, pp_size: int, mode: Mode) -> None:
    setup = setup_of(tp_size, pp_size, 67, mode)
    whole, told = pipeline_step(setup), simulate_step(setup)
    assert told.step_us == pytest.approx(whole.step_us, rel=1e-9)
    assert told.busy_us == pytest.approx(whole.busy_us, rel=1e-9)
    assert dict(told.parts_us) == pytest.approx(dict(whole.parts_us), abs=1e-9 * whole.step_us)
    assert told.tps == pytest.approx(whole.tps)
    assert len(told.spans) < len(whole.spans)


def test_few_micro_batches_are_simulated_as_they_are() -> None:
    setup = setup_of(8, 2, 5)
    assert simulate_step(setup).spans == pipeline_step(setup).spans


def test_what_fills_the_pipeline_is_not_taken_for_what_one_more_takes() -> None:
    """Negative control: the step is no multiple of one micro-batch's, since the pipeline fills once."""
    one, many = (simulate_step(setup_of(8, 2, count)).step_us for count in (1, 64))
    assert many < 0.7 * 64 * one


def test_a_bar_has_the_least_and_the_most_whichever_end_they_are_at() -> None:
    assert Quantity.of(2.0, 3.0, 1.0).bar == [2.0, 1.0, 3.0]
    assert Quantity.of(2.0, 2.5, 3.0).bar == [2.0, 2.0, 3.0]
    assert Quantity.of(2.0, 3.0, 1.0).scaled(1e-3).bar == [2e-3, 1e-3, 3e-3]
