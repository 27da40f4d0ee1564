"""`check-config`: what a ds_config would run, derived before anything is built or started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.check.pipeline import (
    PipelineCheck,
    check_pipeline,
    has_specified_shapes,
    is_specified,
    pipeline_notes,
)
from ds_moe_ep.config import deepspeed_keys
from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.parallel_keys import UNCUT
from ds_moe_ep.config.section import Section, load_ds_config, read_section
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.config.training import WHOLE, Training, read_training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.attention_path import MAX_FLASH_HEAD, PATHS, attention_path, queries_per_block
from ds_moe_ep.records.quantity import gigabytes
from ds_moe_ep.schedule.placement import MAX_AUTO_SLOTS
from ds_moe_ep.sizing.fit import memory_fix, needs
from ds_moe_ep.sizing.footprint import (
    Memory,
    Parameters,
    count_memory,
    count_parameters,
    count_rank_parameters,
    dispatch_bytes,
    forward_flops,
    largest_load,
    replica_bytes,
    tokens_of_batch,
    tokens_of_rank,
    training_flops,
)
from ds_moe_ep.specification.claim import Figure
from ds_moe_ep.specification.claims import stated_and_derived


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The memory of one GPU, and what is left to others in it."""

    gpu_gb: float = 80.0
    reserve_gb: float = 4.0  # CUDA's context, NCCL's buffers, fragmentation
    load: float = 1.0  # rows of the fullest rank over the mean

    def __post_init__(self) -> None:
        if not self.gpu_gb > self.reserve_gb >= 0:
            raise ConfigError(
                f"gpu_gb={self.gpu_gb:g} with reserve_gb={self.reserve_gb:g}: the reserve is a part of the "
                "GPU's memory; lower it or raise gpu_gb"
            )
        if not self.load >= 1:
            raise ConfigError(f"load={self.load:g}: the fullest rank has at least the mean; give 1 or more")

    @property
    def free_bytes(self) -> int:
        return int((self.gpu_gb - self.reserve_gb) * 1e9)


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """Sizes and work that follow once the model is known."""

    model: ModelConfig
    parameters: Parameters
    rank_parameters: Parameters
    memory: Memory
    load_that_fits: float
    micro_batch_tokens: int
    batch_tokens: int
    capacity_rows: int | None
    dispatch_bytes: int
    forward_flops: int
    training_flops: int

    def to_dict(self) -> dict[str, Any]:
        """The check as plain values, for JSON."""
        values = dataclasses.asdict(self)
        for name in ("parameters", "rank_parameters", "memory"):
            values[name] = getattr(self, name).to_dict()
        return values


@dataclass(frozen=True, kw_only=True)
class Check:
    """Everything that `check-config` tells; `details` is None for a ds_config that names no model."""

    path: str
    moe: MoEConfig
    training: Training
    budget: Budget
    details: ModelCheck | PipelineCheck | None
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]

    def to_dict(self) -> dict[str, Any]:
        """The check as plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["training"] |= {"batch": self.training.batch, "num_replicas": self.training.num_replicas}
        values["training"]["sharing_ranks"] = self.training.sharing_ranks
        if self.training.layout == WHOLE:
            del values["training"]["layout"]
        values["details"] = self.details.to_dict() if self.details is not None else None
        return values


def check_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    world_size: int | None = None,
    budget: Budget | None = None,
    tensor_ranks: int = 1,
) -> Check:
    """The run that `source` describes, on the tensor ranks of an mpu, which no ds_config names.

    Raises ConfigError or TopologyError for what cannot work.
    """
    budget = budget or Budget()
    ds_config = load_ds_config(source)
    if "moe_ep" not in ds_config:
        read_section(ds_config)  # names a misspelt section
        raise ConfigError('moe_ep=null: the ds_config has no such section; add "moe_ep": {...}')
    section = read_section(ds_config)
    if tensor_ranks > 1 and section.layout != WHOLE:
        raise ConfigError(f"tensor_ranks={tensor_ranks} with moe_ep.layout: the layout has tensor ranks of its own")
    training = read_training(ds_config, section.moe.ep_size, world_size, section.layout, tensor_ranks)
    details: ModelCheck | PipelineCheck | None = None
    if section.model is not None:
        check = _check_model if section.layout == WHOLE else _check_pipeline
        details = check(section.model, section.moe, training, budget)
    return Check(
        path="ds_config" if isinstance(source, Mapping) else os.fspath(source),
        moe=section.moe,
        training=training,
        budget=budget,
        details=details,
        notes=tuple(_notes(ds_config, section, training)),
        figures=stated_and_derived() if _is_the_specification(section) else (),
    )


def _check_model(model: ModelConfig, moe: MoEConfig, training: Training, budget: Budget) -> ModelCheck:
    memory = count_memory(model, moe, training, budget.load)
    if memory.peak > budget.free_bytes:
        raise ConfigError(
            _does_not_fit(memory, budget, memory_fix(model, moe, training, budget.free_bytes, budget.load))
        )
    tokens = tokens_of_rank(model, training)
    return ModelCheck(
        model=model,
        parameters=count_parameters(model, moe),
        rank_parameters=count_rank_parameters(model, moe, training.dense_cut),
        memory=memory,
        load_that_fits=largest_load(model, moe, training, budget.free_bytes) or budget.load,
        micro_batch_tokens=tokens,
        batch_tokens=tokens_of_batch(model, training),
        capacity_rows=moe.capacity(tokens, training=True),
        dispatch_bytes=dispatch_bytes(tokens // training.dense_cut.size, model, moe, training.precision),
        forward_flops=forward_flops(model, moe),
        training_flops=training_flops(model, moe),
    )


def _check_pipeline(model: ModelConfig, moe: MoEConfig, training: Training, budget: Budget) -> PipelineCheck:
    details = check_pipeline(model, moe, training, budget.free_bytes)
    if details.memory.peak > budget.free_bytes:
        fix = memory_fix(model, moe, training, budget.free_bytes)
        raise ConfigError(_does_not_fit(details.memory, budget, fix))
    return details


def _does_not_fit(memory: Memory, budget: Budget, fix: str) -> str:
    return f"gpu_gb={budget.gpu_gb:g}: {needs(memory)} beside a reserve of {budget.reserve_gb:g}; {fix}"


def _notes(ds_config: Mapping[str, Any], section: Section, training: Training) -> Iterator[str]:
    """Notes on things that a reader should know, though nothing forbids them."""
    moe, model = section.moe, section.model
    release = deepspeed_keys.installed_release()
    known = deepspeed_keys.keys_of(deepspeed_keys.TOP_LEVEL, release).known
    for key in ds_config:
        if key not in known and key != "moe_ep":
            yield f"{key}: DeepSpeed {release} does not know this key and ignores it"
    if "data_parallel_size" in ds_config and "sequence_parallel_size" not in ds_config:
        yield f"data_parallel_size: DeepSpeed {release} reads it beside sequence_parallel_size alone"
    if model is None:
        yield 'moe_ep.model is not given: memory, traffic and arithmetic need it; add "model": "small"'
    yield from sharing_notes(model, moe, training)
    if section.layout == WHOLE:
        yield from _traffic_notes(moe, training)
    else:
        yield from pipeline_notes(ds_config, moe, model, training)
    yield from _replica_notes(moe, model, training)
    if moe.force_even:
        yield "force_even=true: EXPERTS TAKE TOKENS IN TURN, WHATEVER THE GATE SAYS; for throughput runs alone"
    if moe.balance == "none" and moe.capacity_factor is None:
        yield "balance='none' without a capacity: nothing keeps an expert from taking every row"
    if model is not None and attention_path(model.head_size, "cuda") == "blocks":
        num_heads = model.num_heads // section.layout.tp_size
        queries = queries_per_block(training.micro_batch, num_heads, model.sequence_length)
        scores = 4 * training.micro_batch * num_heads * model.sequence_length * min(queries, model.sequence_length)
        yield (
            f"heads of {model.head_size}: flash kernels end at {MAX_FLASH_HEAD}; on GPUs attention runs by "
            f"{PATHS['blocks']}, {gigabytes(scores, 1)} of scores at a time"
        )
    if training.num_replicas > 1 and section.layout == WHOLE:
        grid = RankGrid(world_size=training.world_size, ep_size=moe.ep_size)
        others = grid.expert_data_groups()[0][1:]
        yield f"{grid.num_replicas} expert groups: rank 0 and the ranks {others} hold the same experts"
    if training.precision == "fp16":
        yield "fp16 does not run on DeepSpeed's CPU accelerator: use bf16 or fp32 there"


def sharing_notes(model: ModelConfig | None, moe: MoEConfig, training: Training) -> Iterator[str]:
    """Notes on ranks that share a copy's sequences."""
    cut = training.dense_cut
    if (size := training.sequence_ranks) > 1:
        yield f"{size} ranks share each copy's sequences: a rank has 1/{size} of the tokens"
    if cut.size == 1 or model is None:
        return
    whole, rank = (count_rank_parameters(model, moe, each).dense for each in (UNCUT, cut))
    sizes = f"{cut.size} tensor ranks: each has {rank:,} of {whole:,} dense parameters"
    if cut.source == "mpu":
        yield f"{sizes}: attention, shared expert, embedding and head cut, as Megatron cuts them"
        return
    yield f"DeepSpeed counts train_batch_size over tensor ranks of AutoTP's too: a step has {training.batch} sequences"
    if cut.source == "partition_config":
        yield f"{sizes}, by tensor_parallel.partition_config"
    else:
        yield (
            f"{sizes}: attention cut, the rest whole; without tensor_parallel.partition_config DeepSpeed has a plan "
            "for models of Hugging Face alone"
        )


def _traffic_notes(moe: MoEConfig, training: Training) -> Iterator[str]:
    """Notes on experts that are whole on their ranks."""
    if training.zero_stage and training.num_replicas == 1:
        yield "each expert has one owner: ZeRO shares the dense optimizer states alone"
    if moe.depth == 0 or moe.schedule == "serial":
        yield f"schedule={moe.schedule!r}, depth={moe.depth}: every transfer blocks and nothing is hidden"


def _replica_notes(moe: MoEConfig, model: ModelConfig | None, training: Training) -> Iterator[str]:
    """Notes on slots that nothing fills, and on those that `auto` may take."""
    if moe.replicas and moe.ep_size == 1:
        yield f"replicas={moe.replicas!r} with ep_size=1: every expert is on every rank, and there is nothing to copy"
        return
    if moe.replicas == "auto" and model is not None:
        one, two = (replica_bytes(model, moe, training, slots) for slots in (1, 2))
        each = gigabytes(two - one)
        yield f"replicas='auto' takes 0 to {MAX_AUTO_SLOTS} slots per rank: memory counts one, each is {each}"


def _is_the_specification(section: Section) -> bool:
    model, moe = section.model, section.moe
    if model is None:
        return False
    is_ep16 = (moe.num_experts, moe.ep_size, moe.top_k) == (16, 16, 1) and has_specified_shapes(model)
    return is_ep16 or is_specified(model, moe, section.layout)
