"""Pipeline stages of an engine whose layers are the package's own.

Groups are made over the world, and DeepSpeed calls a layer on the ranks of its stage alone. So the ranks of all stages
meet once per engine, each at its first layer: they tell each other of their layers, and make the groups of every
ep_size. What a stage's ranks must have alike is compared within the stage. Later layers find their groups made.
"""

from __future__ import annotations

import itertools
import socket
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ds_moe_ep.config.section import Section
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.config.training import Training
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.overlapped_layer import OwnLayer
from ds_moe_ep.errors import ConfigError, EngineError, MoEError
from ds_moe_ep.health.diagnosis import ranks_named

BATCH_RULE = "several micro-batches are on their way, and none knows the load of the batch; set it to 'rank'"
UNSCALED = (
    "fp16.enabled=true without ZeRO in pipeline stages: the pipeline's engine does not multiply the loss with the loss "
    "scale that its optimizer divides by; set zero_optimization.stage to 1, or train in bf16"
)
NO_REPORTS = "a report would tell of the first stage's layers alone"
NO_SAVING = "DeepSpeed saves pipelines"
NO_HOOKS = "hooks go to a plain engine; put ds_moe_ep.MoE in the place of DeepSpeed's layer"
_MEETINGS = itertools.count()  # the same number on every rank: each makes its engines in the same order
_HOSTS: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()  # of the ranks, by engine


@dataclass(frozen=True)
class StageLayers:
    """A rank's own layers, as the other ranks hear of them."""

    stage: int
    host: str
    fingerprints: tuple[str, ...]
    ep_sizes: frozenset[int]
    two_level: frozenset[int]  # the ep_sizes of those that may send a copy per node
    replicas: frozenset[int]  # and of those with slots for copies of experts
    timeout_s: float


def stage_of_rank(rank: int) -> int:
    """The stage of a rank of the world: DeepSpeed's stages hold consecutive ranks."""
    return rank // (dist.get_world_size() // seams.num_pipeline_stages())


def model_ranks_of_stage() -> range | None:
    """The numbers `mp_rank_*` in names of checkpoint files that belong to this rank's stage; None without stages."""
    if seams.num_pipeline_stages() == 1:
        return None
    stage, per_stage = seams.pipeline_stage(), seams.tensor_parallel_size()
    return range(stage * per_stage, (stage + 1) * per_stage)


def stage_name(layer: str) -> str:
    """The name of a stage's layer in errors and records: with the stage, where there are several."""
    return f"stage {seams.pipeline_stage()}, {layer}" if seams.num_pipeline_stages() > 1 else layer


def hosts_of(engine: Any) -> list[str]:
    """The hosts of all ranks of an engine whose stages have met. Raises EngineError outside of such an engine."""
    if engine not in _HOSTS:
        raise EngineError(
            f"pipeline stages={seams.num_pipeline_stages()}: expert groups of stages are made while "
            "deepspeed.initialize makes the pipeline's engine; pass it the PipelineModule that holds the layer"
        )
    return _HOSTS[engine]


def meet_stages(engine: Any, layers: Mapping[str, OwnLayer]) -> None:
    """Makes the groups of all stages' layers. Collective over the world, once per engine.

    Raises EngineError on every rank that is there where a stage has no layer, or where the ranks of one differ.
    """
    own = StageLayers(
        stage=seams.pipeline_stage(),
        host=socket.gethostname(),
        fingerprints=tuple(layer.fingerprint() for layer in layers.values()),
        ep_sizes=frozenset(layer.ep_size for layer in layers.values()),
        two_level=frozenset(layer.ep_size for layer in layers.values() if layer.config.two_level != "off"),
        replicas=frozenset(layer.ep_size for layer in layers.values() if layer.config.replicas),
        timeout_s=max(layer.config.timeout_s for layer in layers.values()),
    )
    told = seams.gather(own)
    seams.settle(problem_of(engine, layers))
    refuse_differences(told)
    is_interleaved, timeout_s = seams.has_data_before_experts(engine), max(each.timeout_s for each in told)
    for ep_size in sorted(frozenset.union(*(each.ep_sizes for each in told))):
        needs = any(ep_size in each.replicas for each in told), any(ep_size in each.two_level for each in told)
        make_groups(ep_size, is_interleaved, timeout_s, *needs)
    _HOSTS[engine] = [each.host for each in told]


def problem_of(engine: Any, layers: Mapping[str, OwnLayer]) -> MoEError | None:
    """Error of what a pipeline's engine and these layers do not have together, or None. Local."""
    for name, layer in layers.items():
        if layer.config.balance_scope == "batch":
            return ConfigError(f"moe_ep.balance_scope='batch' in pipeline stages ({name}): {BATCH_RULE}")
    if stage_of_rank(dist.get_rank()) != seams.pipeline_stage():
        return EngineError(
            "topology: the ranks of a stage are not consecutive, as DeepSpeed's expert groups have them; give the "
            "PipelineModule num_stages, or a topology whose first axis is 'pipe'"
        )
    return ConfigError(UNSCALED) if engine.fp16_enabled() and not engine.zero_optimization() else None


def refuse_unscaled(training: Training) -> None:
    """Raises ConfigError for a job in fp16 whose loss a pipeline's engine does not scale."""
    if training.precision == "fp16" and not training.zero_stage:
        raise ConfigError(UNSCALED)


def refuse_in_stages(own: Mapping[str, OwnLayer], section: Section) -> None:
    """Raises for a stage without layers, and for knobs that a pipeline's engine does not heed. Local."""
    if not own:
        raise EngineError(
            "model=PipelineModule: a stage has no ds_moe_ep.MoE layer, and DeepSpeed makes expert groups over all "
            "ranks at once; change partition_method or the number of stages so that each has one"
        )
    rules = {"attach": NO_HOOKS, "async_save": NO_SAVING, "watch": NO_REPORTS, "report_every": NO_REPORTS}
    for name, rule in rules.items():
        if value := getattr(section.moe, name):
            raise ConfigError(f"moe_ep.{name}={value!r} in pipeline stages: {rule}; leave it out")


def make_groups(ep_size: int, is_interleaved: bool, timeout_s: float, replicas: bool, near: bool) -> None:
    """Makes DeepSpeed's groups of an ep_size in every stage, and the lanes beside. Collective over the world.

    `replicas`, `near`: the layers of some stage have slots for copies of experts; send rows inside of nodes too.
    """
    group, ranks = seams.expert_group(ep_size, is_interleaved)
    grid, problem = stage_grid(ep_size, is_interleaved), None
    if ranks not in grid.ep_groups():
        problem = EngineError(
            f"moe_ep.ep_size={ep_size}: DeepSpeed keeps one expert-parallel group per ep_size and process, and this "
            f"one holds ranks {ranks}, which an engine of another layout made; make each in a process of its own"
        )
    seams.settle(problem)
    if ep_size > 1:
        seams.lanes_beside(group, grid.ep_groups(), timeout_s, replicas, near)


def stage_grid(ep_size: int, is_interleaved: bool) -> RankGrid:
    """The expert groups of the engine's stages. Raises TopologyError where ep_size does not fit a stage."""
    return RankGrid(
        world_size=dist.get_world_size(),
        ep_size=ep_size,
        data_before_expert=is_interleaved,
        num_stages=seams.num_pipeline_stages(),
    )


def refuse_differences(told: list[StageLayers]) -> None:
    """Raises EngineError where the ranks of one stage have other layers than its first rank."""
    first: dict[int, int] = {}
    for rank, each in enumerate(told):
        theirs = told[first.setdefault(each.stage, rank)]
        if each.fingerprints != theirs.fingerprints:
            raise EngineError(
                f"moe_ep and the MoE layers of stage {each.stage} on rank {rank} differ from those on rank "
                f"{first[each.stage]}: the ranks of a stage must start with the same configuration and model; compare "
                "their ds_config and arguments"
            )


def wait_for_all(timeout_s: float) -> None:
    """Waits until every rank has come here. Raises EngineError with those that have not within the limit."""
    store = PrefixStore(f"ds_moe_ep stages {next(_MEETINGS)}", _get_default_store())
    store.set(str(dist.get_rank()), "here")
    keys = [str(rank) for rank in range(dist.get_world_size())]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:  # torch.distributed.DistStoreError is one
        missing = [rank for rank in range(len(keys)) if not store.check([keys[rank]])]
        stages = sorted({stage_of_rank(rank) for rank in missing})
        raise EngineError(
            f"pipeline stages {stages}: {ranks_named(missing)} reached no ds_moe_ep.MoE layer within {timeout_s:g} s. "
            "DeepSpeed makes expert groups over all ranks at once, so each stage needs an MoE layer: change "
            "partition_method or the number of stages (or raise moe_ep.timeout_s, where a rank is slow)"
        ) from error
