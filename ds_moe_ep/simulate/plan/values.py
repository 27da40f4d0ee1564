"""Plans and comparisons as plain values, for JSON: names carry units, a bar is [value, low, high]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ds_moe_ep.records.quantity import Quantity, to_json
from ds_moe_ep.simulate.job.replicas import ReplicaGain
from ds_moe_ep.simulate.plan.plan import PARTS, Comparison, Plan, group_of

BAR = "[value, low, high]: low and high are the simulation at both ends of the cluster's ranges, all numbers at once"
SCHEDULE = ("schedule", "chunks", "peer_group_size", "row_cuts", "depth")


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan of one job."""
    setup = plan.job.setup
    training = dataclasses.asdict(setup.training) | {"batch": setup.training.batch}
    return {
        "config": plan.job.path,
        "system": plan.system,
        "mode": setup.mode,
        "cluster": {"name": setup.cluster.name, "num_nodes": setup.cluster.num_nodes, "ranks": setup.cluster.num_ranks},
        "training": training,
        "schedule": {name: getattr(setup.moe, name) for name in SCHEDULE},
        "attention": plan.attention,
        "loads": list(setup.loads),
        "notes": list(plan.job.notes),
        "fit": plan.fit.to_dict(),
        "bar": BAR,
        **_of_step(plan.quantities),
        "serial": _of_step(plan.serial_quantities) if plan.serial else None,
        "choices": [choice.to_json("layer_ms") for choice in plan.choices],
        "choices_at_slower_and_faster_end": [dict(knobs) for knobs in plan.at_ends],
        "bounds": [bound.to_json("step_ms") for bound in plan.bounds],
        "alternatives": [other.to_json("spare_bytes") for other in plan.others],
        "replicas": _of_replicas(plan.replicas) if plan.replicas else None,
        "stated": dataclasses.asdict(plan.stated) if plan.stated else None,
    }


def comparison_values(comparison: Comparison) -> dict[str, Any]:
    """Both plans, and the ratio of their throughputs."""
    same_batch = comparison.same_batch
    return {
        "plan": plan_values(comparison.ours),
        "compared": plan_values(comparison.theirs),
        "tps_ratio": comparison.ratio.bar,
        "tps_ratio_of_same_batch": same_batch.bar if same_batch else None,
        "ratio_bar": "both jobs at the same end of the cluster's ranges",
    }


def _of_replicas(gain: ReplicaGain) -> dict[str, Any]:
    return {
        "slots": gain.slots,
        "copies": gain.num_copies,
        "fullest": gain.fullest,
        "fullest_without": gain.fullest_without,
        "tps_ratio_to_none": gain.over_none.bar,
        "tps_ratio_to_even": gain.over_even.bar,
    }


def _of_step(quantities: Sequence[Quantity]) -> dict[str, Any]:
    return {"measures": to_json(group_of(quantities)), "parts": to_json(group_of(quantities, PARTS))}
