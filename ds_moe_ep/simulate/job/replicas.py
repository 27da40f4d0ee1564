"""Copies of hot experts in a job that is simulated: the placement that `schedule/placement` makes from its loads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_moe_ep.config.training import BYTES
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.schedule.placement import CopyCosts, levelled_rows, place
from ds_moe_ep.simulate.job.routing import loads_of, read_rows
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.predict import Prediction, predict
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.sizing.footprint import SUM_BYTES

PARTS = 1 << 20  # of the mean rows of a rank, so that loads are whole numbers


@dataclass(frozen=True, kw_only=True)
class ReplicaGain:
    """Replicas in use, and throughput with them over that without, and over that of even loads."""

    num_copies: int
    slots: int
    fullest: float  # rows of the fullest rank over the mean
    fullest_without: float
    over_none: Quantity
    over_even: Quantity


def with_load(setup: Setup, load: str) -> Setup:
    """The job under a load, by text as `read_rows` has it: levelled by copies where it has slots for them."""
    moe = setup.moe
    rows_E = read_rows(load, moe.num_experts)
    bare = replace(setup, loads=loads_of(rows_E, moe.ep_size) if rows_E else (), placement=None)
    if not rows_E or not moe.replicas or moe.ep_size == 1:
        return bare
    total = sum(rows_E)
    rows_E = [rows * moe.ep_size / total for rows in rows_E]  # the mean rank has 1
    placement = place(rows_E, EpJob(bare).torus, moe.replicas, copy_costs(bare))
    levelled = levelled_rows([round(rows * PARTS) for rows in rows_E], placement)
    return replace(bare, loads=tuple(rows / PARTS for rows in levelled), placement=placement)


def copy_costs(setup: Setup) -> CopyCosts:
    """Prices of a placement for loads of which the mean rank has 1, from the layer's costs and the cluster's links.

    Transfers hide under one layer's passes, where its rows leave time for them: other layers' passes are not counted.
    """
    job, model = EpJob(setup), setup.model
    costs, tokens, rows = job.costs, setup.micro_batch_tokens, job.rows.sent
    local, forwards = setup.moe.num_local_experts, 1 + model.recompute
    experts_us = (forwards + 1) * costs.experts(rows, local) + costs.weight_grads(rows, local)
    rest_us = forwards * costs.attention(tokens) + costs.attention(tokens, backward=True)
    far_rate, near_rate = (link.rate / link.shared_by for link in (setup.cluster.far, setup.cluster.near))
    expert_bytes = model.expert_params * BYTES[setup.training.precision]
    far_share = 1 - job.torus.node_size / job.torus.size
    row_bytes = model.hidden_size * BYTES[setup.training.precision]
    rows_us = 2 * (forwards + 1) * rows * far_share * row_bytes / far_rate
    return CopyCosts(
        row_us=experts_us,
        near_us=expert_bytes / near_rate,
        far_us=expert_bytes / far_rate,
        gradient_ratio=SUM_BYTES / BYTES[setup.training.precision],
        hidden_us=max(experts_us + rest_us - rows_us, 0.0),
        micro_batches=setup.training.accumulation,
    )


def gain_of(prediction: Prediction, load: str) -> ReplicaGain | None:
    """The gain of a job by its replicas; None where it has no slots, or its load is even."""
    setup = prediction.step.setup
    if setup.placement is None:
        return None
    without = with_load(replace(setup, moe=replace(setup.moe, replicas=0)), load)
    even = replace(without, loads=())
    return ReplicaGain(
        num_copies=len(setup.placement.copies),
        slots=setup.placement.slots,
        fullest=max(setup.loads),
        fullest_without=max(without.loads),
        over_none=prediction.over(predict(without)),
        over_even=prediction.over(predict(even)),
    )
