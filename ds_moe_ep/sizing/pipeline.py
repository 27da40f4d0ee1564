"""Costs of one rank of a layout: parameters of its stage, bytes of its GPU, bytes on the wire.

All of it is derived from shapes, as in footprint.py, and has its symbols; nothing here is measured. T tokens of a
micro-batch are whole on every rank of a tensor group, t is tp_size, m micro-batches per step, u = T*D*b bytes of one
tensor of tokens, n micro-batches in flight: min(pp_size - stage, m), since a stage's backward passes begin once the
last stage has its first micro-batch (1F1B). With ep_size above 1 experts are whole on their ranks, P of a stage share
them, and each tensor rank dispatches T/t of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.training import BYTES, Training
from ds_moe_ep.sizing.footprint import (
    Memory,
    Parameters,
    count_parameters,
    dispatch_bytes,
    forward_flops,
    largest_group,
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
    all_reduces: (
        int  # of a layer and micro-batch: 2 forward, 2 backward, and with recompute 2 again; of attention alone half
    )
    step_all_reduce_bytes: int  # of all layers of a stage and all micro-batches
    send_bytes: int  # of a micro-batch to the next stage; a gradient of as many bytes comes back
    gather_bytes: int  # to make such a message whole in the tensor group: once where it arrives, twice where it began
    dispatch_bytes: (
        int  # of one dispatch of a layer and micro-batch to the stage's other ranks; a combine sends as many
    )
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
    optimizer   4 * (master weight + states) * parameters; ZeRO-1 divides it by the copies of the model, experts that
                are whole by the ranks of the stage that hold the same ones
    buffers     2 or 4 bytes * reduce_bucket_size; a pipeline does not overlap it
    step        under ZeRO the gradients once more, flat, and in fp32: all parameters are one optimizer group; experts
                that are whole are groups of their own, after each other
    """
    held = count_stage_parameters(model, moe, training.layout, index)
    dense, experts = held.dense, held.experts
    if training.zero_stage:
        dense = -(-held.dense // training.num_copies)
        experts = -(-held.experts // (training.num_copies if moe.ep_size == 1 else training.num_replicas))
    memory = memory_of_rank(
        training,
        held.total,
        dense + experts,
        activations=stage_activation_bytes(model, moe, training, index),
        step=_step_bytes(model, moe, training, held, dense + experts),
    )
    return Stage(index=index, parameters=held, memory=memory)


def _step_bytes(model: ModelConfig, moe: MoEConfig, training: Training, held: Parameters, partition: int) -> int:
    if not training.zero_stage:
        return unpartitioned_step_bytes(training, held.total)
    if moe.ep_size > 1:
        partition = largest_group(model, training, held, training.num_copies)
    return (4 + BYTES[training.gradient_precision]) * partition


def count_stage_parameters(model: ModelConfig, moe: MoEConfig, layout: Layout, index: int) -> Parameters:
    """Parameters of a rank of stage `index`: L/pp_size layers, their attention and experts cut by t.

    Norms and gate are whole on each rank, the embedding on those of the first stage, head and final norm on the last.
    With ep_size above 1 a rank holds E/P experts and the shared one, all of them whole.
    """
    whole = count_parameters(replace(model, num_layers=model.num_layers // layout.pp_size), moe)
    is_first, is_last = index == 0, index == layout.pp_size - 1
    shares, shared_shares = (layout.tp_size,) * 2 if moe.ep_size == 1 else (moe.ep_size, 1)
    return Parameters(
        embedding=whole.embedding if is_first else 0,
        attention=whole.attention // layout.tp_size,
        gate=whole.gate,
        experts=whole.experts // shares,
        shared_experts=whole.shared_experts // shared_shares,
        norms=whole.norms - (0 if is_last else 2 * model.hidden_size),
        head=whole.head if is_last else 0,
    )


def stage_activation_bytes(model: ModelConfig, moe: MoEConfig, training: Training, index: int) -> int:
    """Bytes that a rank of stage `index` keeps for its backward passes, at the moment of most.

    inputs      u per layer and micro-batch in flight; without recompute a layer's whole set with each
    one layer   see `_layer_bytes`
    gradients   u of the layer's output, and those of the experts
    messages    see `_message_bytes`
    loss        T*V*(b + 12) on the last stage
    """
    b, layout = BYTES[training.precision], training.layout
    T = tokens_of_rank(model, training)
    u = T * model.hidden_size * b
    layer, gradients = _layer_bytes(model, moe, training)
    inputs = model.num_layers // layout.pp_size * _num_in_flight(training, index)
    kept = inputs * u + layer if model.recompute else inputs * (u + layer)
    loss = T * model.vocab_size * (b + 12) if index == layout.pp_size - 1 else 0
    return kept + u + gradients + _message_bytes(u, training, index) + loss


def _layer_bytes(model: ModelConfig, moe: MoEConfig, training: Training) -> tuple[int, int]:
    """Bytes that one layer keeps of a micro-batch, and those of its experts' gradients while it goes backward.

    one layer   3*u + 4*T*D + 3*T*E*4 whole: norms' outputs, the sum between them, the gate's input in fp32, the router;
                7*u/t cut: q, k, v, rotated q and k, the heads' output twice (other heads: what they save)
    its experts 2*k*u for rows out and back, and (k*F + Fs)*m*T*b/t hidden rows (Fs: width of a shared expert; here m is
                matrices of an expert). Whole ones: 2*k*u/t, and k*T*(2*D + m*F)*b/t received rows and hidden ones
    gradients   the larger of 8*k*T*D (rows times weights, in fp32) and of k*u and the weight gradients of a layer's
                experts, which are summed with those of earlier micro-batches. Of whole ones: the larger of their
                received and hidden rows and of their weight gradients
    """
    b, t = BYTES[training.precision], training.layout.tp_size
    T, D, E, k, m = (
        tokens_of_rank(model, training),
        model.hidden_size,
        moe.num_experts,
        moe.top_k,
        model.expert_matrices,
    )
    u, shared = T * D * b, m * T * model.shared_expert_width * b
    layer, saved = 3 * u + 4 * T * D + 3 * T * E * 4, T * model.attention.saved_width * b
    if moe.ep_size == 1:
        hidden = m * T * k * model.expert_width * b + shared
        weight_gradients = b * E * model.expert_params // t
        return layer + 2 * k * u + (saved + hidden) // t, max(8 * k * T * D, k * u + weight_gradients)
    rows = k * T * (2 * D + m * model.expert_width) * b // t
    weight_gradients = b * moe.num_local_experts * model.expert_params
    return layer + (saved + 2 * k * u + shared) // t + rows, max(rows, weight_gradients)


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
    per_pass = 2 if moe.ep_size == 1 else 1  # behind the attention, and behind experts that are cut
    all_reduces = per_pass * (3 if model.recompute else 2)
    message = message_numbers(model, training) * BYTES[training.precision] if layout.pp_size > 1 else 0
    return PipelineWork(
        micro_batch_tokens=tokens_of_rank(model, training),
        batch_tokens=tokens_of_batch(model, training),
        all_reduce_bytes=all_reduce,
        all_reduces=all_reduces,
        step_all_reduce_bytes=all_reduce * all_reduces * model.num_layers // layout.pp_size * training.accumulation,
        send_bytes=message // t,
        gather_bytes=message * (t - 1) // t,
        dispatch_bytes=dispatch_bytes(tokens_of_rank(model, training) // t, model, moe, training.precision),
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
