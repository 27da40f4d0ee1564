"""Check of a model that a layout cuts: the fullest stage, its work, notes, and ways out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.training import Training
from ds_moe_ep.records.quantity import gigabytes, number, percent
from ds_moe_ep.sizing.fit import largest_micro_batch
from ds_moe_ep.sizing.footprint import Memory, Parameters, count_parameters
from ds_moe_ep.sizing.pipeline import (
    PipelineWork,
    Stage,
    bubble,
    count_work,
    fullest_stage,
    message_numbers,
)
from ds_moe_ep.specification import stated as specified

SPECIFIED_LAYOUT = Layout(tp_size=8, pp_size=2)
SPECIFIED_MICRO_BATCHES = 4  # of one batch (the specification, section 2)


@dataclass(frozen=True, kw_only=True)
class PipelineCheck:
    """Sizes and work of a model in a layout. Bytes and parameters are those of the fullest stage."""

    model: ModelConfig
    parameters: Parameters
    stage: Stage
    largest_micro_batch: int
    work: PipelineWork

    @property
    def memory(self) -> Memory:
        return self.stage.memory

    def to_dict(self) -> dict[str, Any]:
        """The check as plain values, for JSON."""
        stage = {
            "index": self.stage.index,
            "parameters": self.stage.parameters.to_dict(),
            "memory": self.memory.to_dict(),
        }
        return {**dataclasses.asdict(self), "parameters": self.parameters.to_dict(), "stage": stage}


def check_pipeline(model: ModelConfig, moe: MoEConfig, training: Training, free_bytes: int) -> PipelineCheck:
    """The rank of the layout that holds most: what it holds, moves and computes, fit for `free_bytes` or not."""
    return PipelineCheck(
        model=model,
        parameters=count_parameters(model, moe),
        stage=fullest_stage(model, moe, training),
        largest_micro_batch=largest_micro_batch(model, moe, training, free_bytes),
        work=count_work(model, moe, training),
    )


def pipeline_notes(
    ds_config: Mapping[str, Any], moe: MoEConfig, model: ModelConfig | None, training: Training
) -> Iterator[str]:
    """Notes on a layout that a reader should know, though nothing forbids them."""
    layout = training.layout
    if training.zero_stage and training.num_copies == 1:
        yield "one copy of the model (tp_size * pp_size ranks): ZeRO has nothing to share"
    if training.zero_stage and ds_config["zero_optimization"].get("overlap_comm"):
        yield "zero_optimization.overlap_comm=true: DeepSpeed's pipeline engine turns it off"
    if training.accumulation < layout.pp_size:
        yield (
            f"gradient_accumulation_steps={training.accumulation} for {layout.pp_size} stages: a stage waits "
            f"{percent(bubble(training), 0)} of a step, (pp_size - 1)/(m + pp_size - 1) with m micro-batches; give "
            f"at least {4 * layout.pp_size}"
        )
    if moe.ep_size > 1 and training.num_replicas > 1:
        yield f"{training.num_replicas} expert groups per stage: each expert is on {training.num_replicas} of its ranks"
    if model is None:
        return
    if layout.pp_size > 1 and message_numbers(model, training) % layout.tp_size:
        yield (
            f"train_micro_batch_size_per_gpu={training.micro_batch} with moe_ep.layout.tp_size={layout.tp_size}: the "
            "parts of a message between stages are unequal, and DeepSpeed gathers them by a broadcast each instead of "
            f"one all-gather; use a multiple of {layout.tp_size}"
        )
    if is_specified(model, moe, layout):
        yield from _specified_batch(model, moe, training)


def is_specified(model: ModelConfig, moe: MoEConfig, layout: Layout) -> bool:
    """True for the specification's model in its TP8/PP2 layout."""
    return layout == SPECIFIED_LAYOUT and (moe.num_experts, moe.top_k) == (16, 1) and has_specified_shapes(model)


def has_specified_shapes(model: ModelConfig) -> bool:
    """True where the model has the specification's sizes."""
    same = ("num_layers", "hidden_size", "num_heads", "expert_width", "expert", "sequence_length")
    return all(getattr(model, name) == getattr(specified.MODEL, name) for name in same)


def _specified_batch(model: ModelConfig, moe: MoEConfig, training: Training) -> Iterator[str]:
    """Why the specification's batch is no step of its 4 micro-batches."""
    batch = specified.BATCH_SEQUENCES // training.num_copies
    micro_batch = batch // SPECIFIED_MICRO_BATCHES
    whole = dataclasses.replace(training, micro_batch=micro_batch, accumulation=SPECIFIED_MICRO_BATCHES)
    memory = fullest_stage(model, moe, whole).memory
    cut = dataclasses.replace(training, accumulation=-(-batch // training.micro_batch))
    yield (
        f"the specification's batch of {specified.BATCH_SEQUENCES:,} sequences in {SPECIFIED_MICRO_BATCHES} "
        f"micro-batches ({micro_batch} sequences each) cannot fit: it would take {gigabytes(memory.peak, 0)} on a GPU, "
        f"{number(memory.activations / 1e9, 0)} of them activations; in micro-batches of {training.micro_batch} it "
        f"takes {cut.accumulation} of them, with a bubble of {percent(bubble(cut), 1)}"
    )
