"""The end of a step is what DeepSpeed does there, with bytes and links counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from ds_moe_ep.simulate.step.ep_step import ep_step
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.sizing.footprint import count_rank_parameters
from tests.simulate.jobs_for_tests import MODEL, cluster, setup, slow_link

SHARE = 15 / 16 / 10.0  # microseconds a byte: a ring over 16 ranks whose nodes share links of 10 bytes/us
NORM_US = 2 * 4 * SHARE


def job(zero_stage: int, accumulation: int = 1) -> Setup:
    """Sixteen experts on sixteen ranks: only what is dense has copies. Nothing but links takes time at the end."""
    made = setup(cluster(far=slow_link(10.0, shared_by=4.0)), accumulation=accumulation, algorithm="ring")
    return dataclasses.replace(made, training=dataclasses.replace(made.training, zero_stage=zero_stage))


def gradients_us(made: Setup) -> float:
    return ep_step(made).parts_us["gradients"]


def dense_bytes() -> int:
    return 2 * count_rank_parameters(MODEL, job(0).moe).dense


@pytest.mark.parametrize(("zero_stage", "halves"), [(0, 2), (1, 3), (2, 3)])
def test_gradients_are_all_reduced_under_zero_too_and_its_weights_are_gathered(zero_stage: int, halves: int) -> None:
    """An all-reduce is two halves; a reduce-scatter, which DeepSpeed does not use, would be one of them."""
    assert gradients_us(job(zero_stage)) == pytest.approx(halves * dense_bytes() * SHARE + NORM_US)


@pytest.mark.parametrize(("zero_stage", "sums"), [(0, 1), (1, 1), (2, 3)])
def test_only_zero_2_sums_gradients_behind_every_micro_batch(zero_stage: int, sums: int) -> None:
    more_us = gradients_us(job(zero_stage, accumulation=3)) - gradients_us(job(zero_stage))
    assert more_us == pytest.approx((sums - 1) * 2 * dense_bytes() * SHARE)
