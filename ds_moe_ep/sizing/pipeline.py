"""Costs of one rank of a layout: parameters of its stage, bytes of its GPU, bytes on the wire.

All of it is derived from shapes, as in footprint.py, and has its symbols; nothing here is measured. T tokens of a
micro-batch are whole on every rank of a tensor group, t is tp_size, m micro-batches per step, u = T*D*b bytes of one
tensor of tokens, n micro-batches in flight: min(pp_size - stage, m), since a stage's backward passes begin once the
last stage has its first micro-batch (1F1B).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.training import BYTES, Training
from ds_moe_ep.sizing.footprint import (
    Memory,
    Parameters,
    count_parameters,
    forward_flops,
    memory_of_rank,
    tokens_of_batch,
    tokens_of_rank,
    training_flops,
    unpartitioned_step_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Holdings of one rank of a pipeline stage; all ranks of its tensor group hold as much."""

    index: int
    parameters: Parameters
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class PipelineWork:
    """Traffic and arithmetic of a rank. Bytes are those that it sends."""

    micro_batch_tokens: int
    batch_tokens: int
    all_reduce_bytes: int  # of one all-reduce over the tensor group
    all_reduces: int  # of a layer and micro-batch: 2 forward, 2 backward, and with recompute 2 again
    step_all_reduce_bytes: int  # of all layers of a stage and all micro-batches
    send_bytes: int  # of a micro-batch to the next stage; a gradient of as many bytes comes back
    gather_bytes: int  # to make such a message whole in the tensor group: once where it arrives, twice where it began
    bubble: float  # share of a step in which a stage waits for others
    forward_flops: int
    training_flops: int


def fullest_stage(model: ModelConfig, moe: MoEConfig, training: Training) -> Stage:
    """The stage whose GPUs need most."""
    stages = [count_stage(model, moe, training, index) for index in range(training.layout.pp_size)]
    return max(stages, key=lambda stage: stage.memory.peak)


def count_stage(model: ModelConfig, moe: MoEConfig, training: Training, index: int) -> Stage:
    """Parameters and bytes of a rank of stage `index`.

    weights     b * parameters of the rank
    gradients   their precision's bytes * parameters
    optimizer   4 * (master weight + states) * parameters; ZeRO-1 divides it by the copies of the model, experts too
    buffers     2 or 4 bytes * reduce_bucket_size; a pipeline does not overlap it
    step        under ZeRO the gradients once more, flat, and in fp32: all parameters are one optimizer group
    """
    held = count_stage_parameters(model, moe, training.layout, index)
    partition = -(-held.total // training.num_copies) if training.zero_stage else held.total
    gradient_bytes = BYTES[training.gradient_precision]
    whole_step = unpartitioned_step_bytes(training, held.total)
    memory = memory_of_rank(
        training,
        held.total,
        partition,
        activations=stage_activation_bytes(model, moe, training, index),
        step=(4 + gradient_bytes) * partition if training.zero_stage else whole_step,
    )
    return Stage(index=index, parameters=held, memory=memory)


def count_stage_parameters(model: ModelConfig, moe: MoEConfig, layout: Layout, index: int) -> Parameters:
    """Parameters of a rank of stage `index`: L/pp_size layers, their attention and experts cut by t.

    Norms and gate are whole on each rank, the embedding on those of the first stage, head and final norm on the last.
    """
    whole = count_parameters(replace(model, num_layers=model.num_layers // layout.pp_size), moe)
    is_first, is_last = index == 0, index == layout.pp_size - 1
    return Parameters(
        embedding=whole.embedding if is_first else 0,
        attention=whole.attention // layout.tp_size,
        gate=whole.gate,
        experts=whole.experts // layout.tp_size,
        shared_experts=whole.shared_experts // layout.tp_size,
        norms=whole.norms - (0 if is_last else 2 * model.hidden_size),
        head=whole.head if is_last else 0,
    )


def stage_activation_bytes(model: ModelConfig, moe: MoEConfig, training: Training, index: int) -> int:
    """Bytes that a rank of stage `index` keeps for its backward passes, at the moment of most.

    inputs      u per layer and micro-batch in flight; without recompute a layer's whole set with each
    one layer   (3 + 2*k)*u + 4*T*D + 3*T*E*4 whole: norms' outputs, the sum between them, rows out and back, the
                gate's input in fp32, the router; (7*u + (k*F + Fs)*m*T*b)/t cut: q, k, v, rotated q and k, the heads'
                output twice, hidden rows (Fs: width of a shared expert; here m is matrices of an expert)
    gradients   u of the layer's output and the larger of 8*k*T*D (rows times weights, in fp32) and of k*u and the
                weight gradients of a layer's experts, which are summed with those of earlier micro-batches
    messages    see `_message_bytes`
    loss        T*V*(b + 12) on the last stage
    """
    b, layout = BYTES[training.precision], training.layout
    T, D, E, k = tokens_of_rank(model, training), model.hidden_size, moe.num_experts, moe.top_k
    u = T * D * b
    hidden = model.expert_matrices * T * (k * model.expert_width + model.shared_expert_width) * b
    layer = (3 + 2 * k) * u + 4 * T * D + 3 * T * E * 4 + (7 * u + hidden) // layout.tp_size
    weight_gradients = b * E * model.expert_params // layout.tp_size
    gradients = u + max(8 * k * T * D, k * u + weight_gradients)
    inputs = model.num_layers // layout.pp_size * _num_in_flight(training, index)
    kept = inputs * u + layer if model.recompute else inputs * (u + layer)
    loss = T * model.vocab_size * (b + 12) if index == layout.pp_size - 1 else 0
    return kept + gradients + _message_bytes(u, training, index) + loss


def _message_bytes(u: int, training: Training, index: int) -> int:
    """Bytes that a stage has received and sent, which DeepSpeed keeps until the backward pass, or has at hand.

    received    (n + 1)*u + u/t: each micro-batch's message whole, one gradient, and the buffer that parts arrive in
    sent        (n + 1)*u/t: the parts of each micro-batch's message and of one gradient; where t cuts them, 2*u more
                for both, made whole again
    """
    t, n = training.layout.tp_size, _num_in_flight(training, index)
    received = (n + 1) * u + u // t if index > 0 else 0
    is_last = index == training.layout.pp_size - 1
    sent = 0 if is_last else (n + 1) * u // t + (2 * u if t > 1 else 0)
    return received + sent


def _num_in_flight(training: Training, index: int) -> int:
    return min(training.layout.pp_size - index, training.accumulation)


def count_work(model: ModelConfig, moe: MoEConfig, training: Training) -> PipelineWork:
    """Traffic and arithmetic of a rank in a step.

    all-reduce   2*(t - 1)/t * u, as a ring moves it; that of the routing weights' gradient, 4*k*T bytes, is left out
    send         1/t of a message, which DeepSpeed cuts over the tensor group and gathers behind the wire
    bubble       (pp_size - 1)/(m + pp_size - 1)
    """
    layout = training.layout
    t = layout.tp_size
    all_reduce = 2 * (t - 1) * tokens_of_rank(model, training) * model.hidden_size * BYTES[training.precision] // t
    all_reduces = 6 if model.recompute else 4
    message = message_numbers(model, training) * BYTES[training.precision] if layout.pp_size > 1 else 0
    return PipelineWork(
        micro_batch_tokens=tokens_of_rank(model, training),
        batch_tokens=tokens_of_batch(model, training),
        all_reduce_bytes=all_reduce,
        all_reduces=all_reduces,
        step_all_reduce_bytes=all_reduce * all_reduces * model.num_layers // layout.pp_size * training.accumulation,
        send_bytes=message // t,
        gather_bytes=message * (t - 1) // t,
        bubble=bubble(training),
        forward_flops=forward_flops(model, moe),
        training_flops=training_flops(model, moe),
    )


def message_numbers(model: ModelConfig, training: Training) -> int:
    """Numbers in a message between stages: the tokens, and a column for the routing losses."""
    return training.micro_batch * (model.sequence_length * model.hidden_size + 1)


def bubble(training: Training) -> float:
    """The share of a step in which a stage waits for the others: (pp_size - 1)/(m + pp_size - 1)."""
    waits = training.layout.pp_size - 1
    return waits / (training.accumulation + waits)
