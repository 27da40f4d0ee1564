"""Costs of a model before it is built: parameters, bytes of a GPU, bytes on the wire, arithmetic.

All of it is derived from shapes; nothing here is measured. Symbols: T tokens of a rank's micro-batch, D
width, F expert width, E experts, L layers, k choices of a token, P ranks of an expert group, S sequence
length, V vocabulary, m matrices of an expert (2 for GELU, 3 for SwiGLU), b bytes of a number, t tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.parallel_keys import UNCUT, DenseCut
from ds_moe_ep.config.training import BYTES, Training

# DeepSpeed splits expert parameters into optimizer groups of at most this many (moe/utils.py)
EXPERT_GROUP_ELEMENTS = 178_956_971
SUM_BYTES = 4  # of one number of a copy's gradient sums, which are fp32


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters by kind."""

    embedding: int
    attention: int
    gate: int
    experts: int
    shared_experts: int
    norms: int
    head: int

    @property
    def dense(self) -> int:
        """Parameters that every rank holds."""
        return self.embedding + self.attention + self.gate + self.shared_experts + self.norms + self.head

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def to_dict(self) -> dict[str, Any]:
        """The numbers by kind and their sums, for JSON."""
        return {**vars(self), "dense": self.dense, "total": self.total}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU by kind, at the moment when most of them are needed."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of one micro-batch in its backward pass
    buffers: int  # DeepSpeed's gradient buckets, beside the activations
    step: int  # fp32 gradients of an optimizer step, when activations and buckets are gone
    host_optimizer: int  # bytes in the host's memory, when the optimizer is offloaded
    replicas: int = 0  # slots for copies of other ranks' experts, and gradient sums on their way home

    @property
    def persistent(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.gradients + self.optimizer + self.replicas

    @property
    def peak(self) -> int:
        """The largest sum that is alive at once: in the backward pass or in the optimizer step."""
        return self.persistent + max(self.activations + self.buffers, self.step)

    def to_dict(self) -> dict[str, Any]:
        """The bytes by kind and their sums, for JSON."""
        return {**vars(self), "persistent": self.persistent, "peak": self.peak}


def count_parameters(model: ModelConfig, moe: MoEConfig) -> Parameters:
    """Parameters of the whole model.

    Embedding V*D and head V*D (not tied). A layer has attention 4*D*D, gate D*E, norms 4*D and E experts of
    m*D*F; one more norm of 2*D before the head. Positions are rotations and cost none.
    """
    L, D = model.num_layers, model.hidden_size
    return Parameters(
        embedding=model.vocab_size * D,
        attention=L * model.attention.params,
        gate=L * (D + moe.gate_bias) * moe.num_experts,
        experts=L * moe.num_experts * model.expert_params,
        shared_experts=L * sum(_shared_shapes(model).values()),
        norms=L * 4 * D + 2 * D,
        head=model.vocab_size * D,
    )


def count_rank_parameters(model: ModelConfig, moe: MoEConfig, cut: DenseCut = UNCUT) -> Parameters:
    """Parameters that one rank holds: E/P experts of each layer, and everything dense, 1/t of what `cut` names."""
    whole = count_parameters(model, moe)
    parts = {"experts": whole.experts // moe.ep_size}
    if cut.size > 1:
        layers = [f"layers.{index}." for index in range(model.num_layers)]
        parts["attention"] = sum(_held(_attention_shapes(model), layer, cut) for layer in layers)
        parts["shared_experts"] = sum(_held(_shared_shapes(model), layer, cut) for layer in layers)
        parts |= {name: getattr(whole, name) // cut.shares(f"{name}.weight") for name in ("embedding", "head")}
    return Parameters(**{**vars(whole), **parts})


def _held(sizes: dict[str, int], layer: str, cut: DenseCut) -> int:
    return sum(size // cut.shares(layer + name) for name, size in sizes.items())


def _attention_shapes(model: ModelConfig) -> dict[str, int]:
    """Numbers in each weight of a layer's attention, by the package's names."""
    inputs = model.attention.input_params
    return {"attention.qkv.weight": inputs, "attention.out.weight": model.attention.params - inputs}


def _shared_shapes(model: ModelConfig) -> dict[str, int]:
    """The same of a layer's shared expert."""
    D, Fs = model.hidden_size, model.shared_expert_width
    if not Fs:
        return {}
    inner = ("fc1",) if model.expert_matrices == 2 else ("gate", "up")
    widths = {**dict.fromkeys(inner, Fs), "fc2" if model.expert_matrices == 2 else "down": D}
    sizes = {f"{name}.weight": D * Fs for name in widths}
    sizes |= {f"{name}.bias": width for name, width in widths.items()} if model.expert_bias else {}
    return {f"feed_forward.deepspeed_moe.shared.{name}": size for name, size in sizes.items()}


def count_memory(model: ModelConfig, moe: MoEConfig, training: Training, load: float = 1.0) -> Memory:
    """Bytes of one GPU, for a rank that receives `load` times the mean number of rows.

    weights     b * parameters of the rank
    gradients   their precision's bytes * parameters; under ZeRO-2 divided like the optimizer's states
    optimizer   4 * (master weight + states) * parameters. ZeRO divides it for dense parameters by the ranks that hold
                the same ones (world / t), for experts by those (world / ep_size), which may be one
    buffers     2 or 4 bytes * reduce_bucket_size (twice with overlap_comm)
    replicas    see `replica_bytes`; "auto" counts as one slot
    """
    held = count_rank_parameters(model, moe, training.dense_cut)
    dense_cut, expert_cut = (_dense_owners(training), training.num_replicas) if training.zero_stage else (1, 1)
    memory = memory_of_rank(
        training,
        held.total,
        -(-held.dense // dense_cut) + -(-held.experts // expert_cut),
        activations=activation_bytes(model, moe, training, load),
        step=_step_bytes(model, held, training),
    )
    num_slots = 1 if moe.replicas == "auto" else moe.replicas
    return replace(memory, replicas=replica_bytes(model, moe, training, num_slots))


def replica_bytes(model: ModelConfig, moe: MoEConfig, training: Training, num_slots: int) -> int:
    """Bytes of so many slots in each layer, and of what one backward pass makes of them beside.

    S * slot_bytes + (S * b + (E/P + 2) * 4) * parameters of an expert: gradients of the slots' experts in one layer;
    and there, on their way home, a sum for each of the rank's own experts, one that is added to it, and one that comes
    for the layer before.
    """
    if not num_slots or moe.ep_size == 1:
        return 0
    at_once = num_slots * BYTES[training.precision] + SUM_BYTES * (moe.num_local_experts + 2)
    return num_slots * slot_bytes(model, training) + at_once * model.expert_params


def slot_bytes(model: ModelConfig, training: Training) -> int:
    """Bytes of one slot in each layer: L * (b + 4) * parameters of an expert, its weights and its gradient sums."""
    return model.num_layers * (BYTES[training.precision] + SUM_BYTES) * model.expert_params


def memory_of_rank(training: Training, held: int, partition: int, *, activations: int, step: int) -> Memory:
    """Bytes of a rank that holds so many parameters and the optimizer's states of `partition` of them."""
    gradient_bytes = BYTES[training.gradient_precision]
    has_master = training.precision != "fp32" or training.zero_stage > 0
    optimizer = 4 * (has_master + training.optimizer_states) * partition
    return Memory(
        weights=BYTES[training.precision] * held,
        gradients=gradient_bytes * (partition if training.zero_stage == 2 else held),
        optimizer=0 if training.offload else optimizer,
        activations=activations,
        buffers=gradient_bytes * training.bucket_elements,
        step=0 if training.offload else step,
        host_optimizer=optimizer if training.offload else 0,
    )


def activation_bytes(model: ModelConfig, moe: MoEConfig, training: Training, load: float = 1.0) -> int:
    """Bytes that one micro-batch keeps for its backward pass, at the moment of most.

    attention of a layer   9*T*D*b: the norm's two ends, q, k, v, rotated q and k, the heads' output twice; with other
                           heads (2*D + the columns that they save)*T*b
    experts of a layer     (3*T*D + 2*k*T*D)*b on the sender and load*k*T*(2*D + m*F)*b on the receiver
    router of a layer      3*T*E*4
    gradients              of the layer in work: load*k*T*(2*D + m*F)*b
    loss                   T*V*(b + 12)

    Tensor ranks have all T tokens: of the attention seven of the nine are theirs by 1/t where it is cut, and of the
    experts all but 3*T*D*b. With recompute only the inputs of L layers (T*D*b each) and one layer's set are alive.
    The S x S scores are not counted: flash kernels do not store them, and those of a block of queries are gone before
    the experts' rows.
    """
    b = BYTES[training.precision]
    T, D, t = tokens_of_rank(model, training), model.hidden_size, training.dense_cut.size
    saved = model.attention.saved_width / training.dense_cut.shares("layers.0.attention.qkv.weight")
    attention = (2 * D + saved) * T * b
    rows = load * moe.top_k * T * (2 * D + model.expert_matrices * model.expert_width) * b / t
    shared = model.expert_matrices * T * model.shared_expert_width * b
    layer = attention + (3 + 2 * moe.top_k / t) * T * D * b + rows + shared + 3 * T * moe.num_experts * 4
    # AutoTP gathers the logits that a head in parts computes, and Megatron's loss takes the parts.
    loss = T * model.vocab_size * (b + 12) // (t if training.dense_cut.source == "mpu" else 1)
    kept = model.num_layers * T * D * b + layer if model.recompute else model.num_layers * layer
    return int(kept + rows + loss)


def largest_load(model: ModelConfig, moe: MoEConfig, training: Training, free_bytes: int) -> float | None:
    """Times of the mean rows that a rank may receive within `free_bytes`; None when 1 does not fit."""
    even = count_memory(model, moe, training)
    if even.peak > free_bytes:
        return None
    room = free_bytes - even.persistent - even.buffers - even.activations
    slope = activation_bytes(model, moe, training, load=2.0) - even.activations
    return 1 + room / slope


def tokens_of_rank(model: ModelConfig, training: Training) -> int:
    """Tokens of one rank in one micro-batch: T = sequences * S, or its part of them where ranks share sequences."""
    return training.micro_batch * model.sequence_length // training.sequence_ranks


def tokens_of_batch(model: ModelConfig, training: Training) -> int:
    """Tokens of one optimizer step over all ranks."""
    return training.batch * model.sequence_length


def dispatch_bytes(tokens: int, model: ModelConfig, moe: MoEConfig, precision: str) -> int:
    """Bytes that one rank sends to other ranks when it dispatches `tokens` of one layer, evenly routed.

    k * T * D * b * (P - 1)/P; the combine sends as many back, and the backward pass does both again.
    """
    row_bytes = model.hidden_size * BYTES[precision]
    return moe.top_k * tokens * row_bytes * (moe.ep_size - 1) // moe.ep_size


def forward_flops(model: ModelConfig, moe: MoEConfig) -> int:
    """Floating-point operations of one token forward; training takes three times as many.

    A layer: 8*D*D for the projections, 2*S*D for causal scores and their sum over values (half of S each),
    2*D*E for the gate and 2*k parameters of an expert; then 2*V*D for the head.
    """
    dense, experts = layer_flops(model, moe)
    return model.num_layers * (dense + experts) + 2 * model.vocab_size * model.hidden_size


def layer_flops(model: ModelConfig, moe: MoEConfig) -> tuple[int, int]:
    """Operations of one token in a layer, forward: without the experts of its choices, and in them."""
    D, m = model.hidden_size, model.expert_matrices
    shared = 2 * m * D * model.shared_expert_width
    attention = 2 * model.attention.params + model.sequence_length * model.attention.scores_width
    dense = attention + 2 * D * moe.num_experts + shared
    return dense, 2 * moe.top_k * m * D * model.expert_width


def expert_share(model: ModelConfig, moe: MoEConfig) -> float:
    """Share of a layer's arithmetic that is the experts'."""
    dense, experts = layer_flops(model, moe)
    return experts / (dense + experts)


def training_flops(model: ModelConfig, moe: MoEConfig) -> int:
    """Operations of one token in training, without those that recomputation repeats."""
    return 3 * forward_flops(model, moe)


def unpartitioned_step_bytes(training: Training, held: int) -> int:
    """Gradients in fp32 during a step without ZeRO: of all parameters that are not fp32 themselves."""
    return 4 * held * (training.precision != "fp32")


def _step_bytes(model: ModelConfig, held: Parameters, training: Training) -> int:
    """Gradients in fp32 during a step: of one group after the other under ZeRO, of all without it.

    DeepSpeed never splits one parameter, so an expert's matrix may be larger than its group's limit.
    """
    if training.zero_stage == 0:
        return unpartitioned_step_bytes(training, held.total)
    return (4 + BYTES[training.gradient_precision]) * largest_group(model, training, held, _dense_owners(training))


def _dense_owners(training: Training) -> int:
    """Ranks over which ZeRO shares a dense weight, or a tensor rank's part of one."""
    return training.world_size // training.dense_cut.size


def largest_group(model: ModelConfig, training: Training, held: Parameters, dense_cut: int) -> int:
    """Parameters of a rank's part of the largest optimizer group under ZeRO, which cuts dense ones by `dense_cut`."""
    largest = max(model.hidden_size * model.expert_width, EXPERT_GROUP_ELEMENTS)
    return max(held.dense // dense_cut, min(held.experts, largest) // training.num_replicas)
