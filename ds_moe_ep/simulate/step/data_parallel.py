"""End of an expert-parallel step, once behind its micro-batches: gradients, their norm, the optimizer, weights.

Dense gradients are summed over all ranks, or over those of one place in the groups of tensor ranks, and experts' over
those that hold the same. Under ZeRO, too, each rank gets all of the sums and keeps its part: DeepSpeed's buckets go by
all-reduce, not by reduce-scatter (average_tensor in zero/stage_1_and_2.py, with use_multi_rank_bucket_allreduce, its
default). ZeRO-2 sums behind every micro-batch. Then all ranks agree on the norm, each updates its part, and under ZeRO
the updated weights go back to those that hold them.
"""

from __future__ import annotations

from ds_moe_ep.config.training import BYTES
from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import START, Load, Outcome, Program
from ds_moe_ep.schedule.spans import Tags
from ds_moe_ep.simulate.cluster.all_reduce import Group, all_reduce_load, gather_load, group_of, on_host
from ds_moe_ep.simulate.step.costs import LayerCosts
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.sizing.footprint import count_rank_parameters

STEP = Tags("step", "step")


def finish_step(setup: Setup, costs: LayerCosts) -> Outcome:
    """The end of a step, as a program that has run; one rank stands for all."""
    training, cluster = setup.training, setup.cluster
    held, tensor = count_rank_parameters(setup.model, setup.moe, training.dense_cut), training.dense_cut.size
    everyone = group_of(cluster, training.world_size)
    alike = group_of(cluster, training.world_size // tensor, stride=tensor)
    owners = group_of(cluster, training.num_replicas, stride=training.ep_size)
    shares = (("dense", alike, held.dense), ("experts", owners, held.experts))
    program, event = Program(), START

    def add(name: str, lane: str, load: Load) -> None:
        nonlocal event
        if load != Load():
            event = program.add(name, 0, lane, load, event, STEP)

    for _ in range(training.accumulation if training.zero_stage == 2 else 1):
        for name, group, parameters in shares:
            add(f"reduce gradients, {name}", "gradients", reduce_load(setup, group, parameters, training.world_size))
    add("norm of gradients", "gradients", all_reduce_load(cluster, everyone, 4.0, training.world_size, setup.algorithm))
    add("optimizer", "compute", _optimizer(setup, costs, sum(_partition(setup, *share[1:]) for share in shares)))
    for name, group, parameters in shares if training.zero_stage else ():
        weights_bytes = float(parameters * BYTES[training.precision])
        add(f"gather weights, {name}", "gradients", gather_load(cluster, group, weights_bytes, training.world_size))
    return program.run([cluster.host.cores])


def _partition(setup: Setup, group: Group, parameters: int) -> float:
    """Parameters that one rank of the group updates."""
    return parameters / group.size if setup.training.zero_stage else float(parameters)


def reduce_load(setup: Setup, group: Group, parameters: int, num_ranks: int) -> Load:
    """The sum of so many gradients over a group, in `num_ranks` ranks at the same moment, under ZeRO as without."""
    num_bytes = float(parameters * BYTES[setup.training.gradient_precision])
    return all_reduce_load(setup.cluster, group, num_bytes, num_ranks, setup.algorithm)


def _optimizer(setup: Setup, costs: LayerCosts, parameters: float) -> Load:
    time_us = costs.optimizer(setup.training, parameters)
    on_cores = setup.cluster.computes_on == "host"
    return Load((on_host(time_us, setup.training.world_size) if on_cores else Phase(time_us),))
