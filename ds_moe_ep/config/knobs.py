"""Every knob of the package, with its rule; read once at the door and passed on as values.

`MoEConfig` is the section `"moe_ep"` of a ds_config and the settings of one layer. `ModelConfig` is the
4-layer model, `Layout` its cut by tensor and pipeline parallelism. All are frozen, refuse unknown keys, and answer
questions before anything is built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_moe_ep.config.attention_shape import AttentionShape
from ds_moe_ep.config.fields import check_fields, from_dict, knob, to_fp32
from ds_moe_ep.config.two_level import check_replicas, check_two_level
from ds_moe_ep.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One expert-parallel layer: who computes, how tokens are routed, how traffic is hidden."""

    # who computes
    num_experts: int = knob(16, "experts of a layer, over all ranks", 1)
    ep_size: int = knob(1, "ranks that share a layer's experts; it divides num_experts and the world", 1)
    node_size: int = knob(0, "ranks of one node; 0 counts the ranks that share a host name", 0)
    sequence_parallel: bool | None = knob(
        None, "tokens come cut over the tensor ranks (Megatron's sequence parallelism); null: as parameters are marked"
    )

    # routing
    top_k: int = knob(1, "experts that a token visits", 1)
    score: Literal["softmax", "sigmoid"] = knob("softmax", "what turns gate logits into scores, in fp32")
    renormalize: bool | None = knob(
        None,
        "divide the k weights by their sum (norm_topk_prob; with softmax scores the same as a softmax after top-k); "
        "null does what DeepSpeed does: not for top-1, else yes",
    )
    n_group: int = knob(
        1,
        "groups of experts, of which a token visits topk_group: group-limited routing, and node-limited where groups "
        "are nodes (DeepSeek-V3, arXiv 2412.19437); 1 limits nothing",
        1,
    )
    topk_group: int = knob(1, "groups of experts that a token visits at most", 1)
    group_score: Literal["top2_sum", "max"] = knob(
        "top2_sum", "score of a group: the sum of its two best experts (DeepSeek-V3), or its best (arXiv 2405.04434)"
    )
    route_scale: float = knob(1.0, "factor on the weights (routed_scaling_factor of arXiv 2412.19437)", 0)
    router_dtype: Literal["fp32", "fp64", "tokens"] = knob(
        "fp32", "type of the gate's product: fp32 (arXiv 2101.03961), fp64 (scores too), or that of the tokens"
    )
    gate_bias: bool = knob(False, "the gate's product has a trained bias (gpt-oss, arXiv 2508.10925)")
    force_even: bool = knob(
        False,
        "FOR THROUGHPUT RUNS ALONE: experts take tokens in turn, whatever the gate says; nothing useful is learnt",
    )
    noise: Literal["none", "jitter", "rsample"] = knob(
        "none", "training noise: on the gate's input (jitter) or Gumbel noise on the choice (rsample)"
    )
    sample_second: bool = knob(False, "top-2: draw the second expert by Gumbel noise (DeepSpeed's default)")

    # capacity
    capacity_factor: float | None = knob(
        None, "rows that an expert takes from a rank, times tokens * top_k / num_experts; null drops nothing", 0
    )
    eval_capacity_factor: float | None = knob(None, "the same outside training", 0)
    min_capacity: int = knob(4, "smallest capacity of an expert, in rows", 0)
    drop_policy: Literal["position", "score", "random"] = knob(
        "position", "who keeps a place when an expert is full: first come, best score, or drawn (top-1)"
    )

    # balance
    balance: Literal["aux_loss", "bias", "bias_and_aux_loss", "none"] = knob(
        "aux_loss",
        "load balancing: auxiliary loss, expert bias without a loss (arXiv 2408.15664), both (arXiv 2412.19437), or "
        "none",
    )
    balance_scope: Literal["rank", "group", "sequence", "batch"] = knob(
        "rank",
        "tokens whose load the auxiliary loss sees: this rank's (DeepSpeed), the expert group's, each sequence's "
        "(arXiv 2412.19437), or those of all data-parallel ranks since the last optimizer step (arXiv 2501.11873)",
    )
    sequence_first: bool = knob(
        False, "tokens come as [sequence, batch, D], as Megatron has them: for balance_scope 'sequence'"
    )
    aux_loss_weight: float = knob(1.0, "weight of the auxiliary loss in l_aux", 0)
    z_loss_weight: float = knob(0.0, "weight of the router z-loss (arXiv 2202.08906) in l_aux", 0)
    bias_step: float = knob(0.001, "step of the expert bias after each optimizer step", 0)

    replicas: int | Literal["auto"] = knob(
        0,
        "slots per rank for copies of hot experts of other ranks, which change the time alone; 0 is off, 'auto' takes "
        "what pays",
        0,
    )
    replica_traffic: float = knob(
        0.5,
        "time of rows' exchanges over that of their products, which prices a number of `replicas`; 'auto' measures it",
        0,
    )
    replica_pass_share: float = knob(
        1 / 32, "cost of a copy in a pass, in parts of a rank's rows, for a number of `replicas`; 'auto' measures it", 0
    )

    # traffic
    schedule: Literal["auto", "serial", "chunks", "peers"] = knob(
        "auto", "pieces of the exchange: measured and chosen, all at once, equal token chunks, or groups of peers"
    )
    retune_drift: float = knob(
        0.5,
        "'auto' measures again when a rank's rows, or their time on the link, change by this; 0: never",
        0,
    )
    chunks: int = knob(4, "pieces of the schedule 'chunks'", 1)
    peer_group_size: int = knob(0, "far ranks in one piece of the schedule 'peers'; 0 takes one node's", 0)
    row_cuts: int = knob(1, "row cuts of each group of peers", 1)
    depth: int = knob(
        2, "pieces that dispatches are issued ahead; 1 for one hardware queue; 0 blocks: nothing is hidden", 0
    )
    weight_blocks: int = knob(
        1,
        "blocks of rows that a weight gradient of 'peers' is summed over, 4 at most: more fill the time of slow links",
        1,
    )
    bit_equal: bool = knob(
        False, "every schedule gives the same bits on a CPU, at the price of sums over blocks of rows"
    )
    two_level: Literal["off", "auto", "copies", "sums"] = knob(
        "off",
        "a token's rows for a far node cross as one copy and are spread there (copies), and come back as one sum "
        "(sums); 'auto': copies where the schedule 'auto' measures that they pay",
    )
    transport: Literal["auto", "pairwise", "collective"] = knob(
        "auto", "what moves rows: grouped isend/irecv, or all-to-all; 'auto' takes this where all ranks meet on a CPU"
    )
    kernels: Literal["auto", "triton", "torch"] = knob(
        "auto",
        "routing, permute and activations: Triton's kernels (auto: on CUDA where it is installed), or plain torch",
    )
    grouped_products: Literal["auto", "on", "off"] = knob(
        "auto",
        "one matrix product for all experts of a rank, and one for all copies in its slots (auto: bf16 on compute "
        "capability 9 and 10, or with a capacity)",
    )
    max_ctas: int = knob(0, "NCCL's thread blocks for the transfers of a lane at most; 0 leaves it to NCCL", 0)
    meter_every: int = knob(0, "steps between two measurements of hidden communication; 0 measures none", 0)
    verify_every: int = knob(0, "steps between two checks of a layer, in turn, against a blocking path; 0: none", 0)
    watch: str | None = knob(
        None, "folder in which rank 0 writes the run's figures, for `python -m ds_moe_ep watch`; null writes none"
    )
    report_every: int = knob(
        0, "steps between two reports of the load; 0 takes 10 with `watch`, else DeepSpeed's steps_per_print", 0
    )
    heat_map_every: int = knob(
        100, "steps between two pictures of the load in TensorBoard, layers by experts; 0 draws none", 0
    )
    async_save: bool = knob(False, "checkpoints are written behind training, which waits for the host copy alone")
    check_crc: bool = knob(
        True, "a load first compares checkpoint files with the CRC-32 in them, which reads each once more; false: no"
    )
    attach: bool = knob(False, "initialize also hooks DeepSpeed's own MoE layers and AutoEP's (attach_overlap)")
    timeout_s: float = knob(600.0, "time limit of one transfer in seconds", 0.001)

    def __post_init__(self) -> None:
        check_fields(self, "moe_ep")
        if self.num_experts % self.ep_size:
            multiple = -(-self.num_experts // self.ep_size) * self.ep_size
            raise ConfigError(
                f"moe_ep.num_experts={self.num_experts} cannot be shared by ep_size={self.ep_size}: use a "
                f"multiple of {self.ep_size} ({multiple}) or an ep_size that divides {self.num_experts}"
            )
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"moe_ep.top_k={self.top_k}: a token cannot visit more experts than num_experts="
                f"{self.num_experts}; lower top_k"
            )
        if self.drop_policy == "random" and self.top_k != 1:
            raise ConfigError(
                f"moe_ep.drop_policy='random' with top_k={self.top_k}: random token selection is defined for "
                "top-1 alone; use 'position' or 'score'"
            )
        if self.bit_equal and self.grouped_products == "on":
            raise ConfigError(
                "moe_ep.bit_equal=true with grouped_products='on': a grouped product sums in an order of its own; "
                "use 'auto' or 'off'"
            )
        if self.watch is not None and not self.watch.strip():
            raise ConfigError(f"moe_ep.watch={self.watch!r}: names no folder; give one, or null to write nothing")
        if self.sample_second and self.top_k != 2:
            raise ConfigError(
                f"moe_ep.sample_second=true with top_k={self.top_k}: only top-2 draws its second expert; "
                "set it to false"
            )
        self._check_groups()
        check_two_level(self.two_level, self.replicas, self.schedule, self.row_cuts)
        if self.ep_size > 1:
            check_replicas(self.replicas, self.num_experts - self.num_local_experts)

    def _check_groups(self) -> None:
        """Raises ConfigError where experts cannot be chosen by groups as the knobs say."""
        if self.num_experts % self.n_group:
            raise ConfigError(
                f"moe_ep.n_group={self.n_group} does not divide num_experts={self.num_experts}: groups hold equally "
                "many experts; change one of them"
            )
        per_group = self.num_experts // self.n_group
        if self.topk_group > self.n_group:
            raise ConfigError(
                f"moe_ep.topk_group={self.topk_group}: there are n_group={self.n_group} groups to visit; lower it"
            )
        if self.top_k > self.topk_group * per_group:
            raise ConfigError(
                f"moe_ep.top_k={self.top_k}: topk_group={self.topk_group} of n_group={self.n_group} groups hold "
                f"{self.topk_group * per_group} experts; lower top_k or raise topk_group"
            )
        if self.n_group > 1 and self.group_score == "top2_sum" and per_group < 2:
            raise ConfigError(
                f"moe_ep.group_score='top2_sum' with n_group={self.n_group}: a group holds {per_group} expert, and no "
                "two best ones; use 'max'"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str = "moe_ep") -> MoEConfig:
        """The configuration that `values` describes. Raises ConfigError for an unknown key or a bad value."""
        return from_dict(cls, values, path)

    @property
    def is_serial(self) -> bool:
        """True where nothing is hidden; 'auto' hides nothing until it has chosen."""
        return self.schedule in ("serial", "auto")

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def renormalizes(self) -> bool:
        """True where the k weights are divided by their sum; DeepSpeed does so for every k but 1."""
        return self.top_k > 1 if self.renormalize is None else self.renormalize

    @property
    def has_bias(self) -> bool:
        """True where a bias per expert moves the choice."""
        return self.balance in ("bias", "bias_and_aux_loss")

    @property
    def has_aux_loss(self) -> bool:
        """True where the load has a loss."""
        return self.balance in ("aux_loss", "bias_and_aux_loss") and bool(self.aux_loss_weight)

    def capacity(self, num_tokens: int, training: bool) -> int | None:
        """Rows that one expert takes from one rank, or None for no limit (GShard, arXiv 2006.16668, 2.2)."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        exact = to_fp32(to_fp32(num_tokens / self.num_experts) * to_fp32(factor * self.top_k))  # as DeepSpeed rounds
        return max(math.ceil(exact), self.min_capacity)

    def fingerprint(self) -> str:
        """A hash of every knob; ranks compare it once at start."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model of attention and MoE layers (the specification, section 1.1)."""

    num_layers: int = knob(4, "transformer layers", 1)
    hidden_size: int = knob(8192, "width D of a token", 1)
    num_heads: int = knob(16, "attention heads; they divide hidden_size", 1)
    expert_width: int = knob(32768, "inner width F of an expert", 1)
    expert: Literal["gelu", "swiglu"] = knob("gelu", "the experts' kind")
    expert_bias: bool = knob(False, "experts have biases")
    shared_expert_width: int = knob(0, "inner width of an expert that every token visits; 0 for none", 0)
    vocab_size: int = knob(256, "tokens of the vocabulary (256: bytes)", 2)
    sequence_length: int = knob(10000, "longest sequence in tokens", 2)
    recompute: bool = knob(True, "recompute each layer in the backward pass instead of storing it")

    def __post_init__(self) -> None:
        check_fields(self, "moe_ep.model")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"moe_ep.model.hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}: "
                "every head needs the same width; change one of them"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | str, path: str = "moe_ep.model") -> ModelConfig:
        """The model that `values` describes: a name of MODELS, or a mapping of knobs."""
        if isinstance(values, str):
            if values not in MODELS:
                raise ConfigError(f"{path}={values!r} is no known model; {nearest(values, MODELS)}")
            return MODELS[values]
        return from_dict(cls, values, path)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def attention(self) -> AttentionShape:
        """The widths of a layer's attention."""
        return AttentionShape.whole(self.hidden_size)

    @property
    def expert_matrices(self) -> int:
        """Weight matrices of one expert: 2 for GELU, 3 for SwiGLU."""
        return 3 if self.expert == "swiglu" else 2

    @property
    def expert_params(self) -> int:
        """Parameters of one expert of one layer."""
        biases = self.expert_width * (self.expert_matrices - 1) + self.hidden_size if self.expert_bias else 0
        return self.expert_matrices * self.hidden_size * self.expert_width + biases


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The model cut over ranks in the way of Megatron: widths over a tensor group, layers over a pipeline."""

    tp_size: int = knob(1, "ranks that share every width: heads, and the inner width of each expert", 1)
    pp_size: int = knob(1, "pipeline stages, which share the layers", 1)

    def __post_init__(self) -> None:
        check_fields(self, "moe_ep.layout")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str = "moe_ep.layout") -> Layout:
        """The layout that `values` describes. Raises ConfigError for an unknown key or a bad value."""
        return from_dict(cls, values, path)

    @property
    def size(self) -> int:
        """Ranks of one copy of the model."""
        return self.tp_size * self.pp_size

    def check(self, model: ModelConfig, moe: MoEConfig) -> None:
        """Raises ConfigError where the model cannot be cut so."""
        cuts_experts = self.tp_size > 1 and moe.ep_size == 1
        for name in ("num_heads", *(("expert_width", "shared_expert_width") if cuts_experts else ())):
            value = getattr(model, name)
            if value % self.tp_size:
                raise ConfigError(
                    f"moe_ep.layout.tp_size={self.tp_size} does not divide moe_ep.model.{name}={value}: every rank of "
                    "a tensor group holds an equal share; change one of them"
                )
        if model.num_layers % self.pp_size:
            raise ConfigError(
                f"moe_ep.layout.pp_size={self.pp_size} does not divide moe_ep.model.num_layers={model.num_layers}: "
                "stages hold equally many layers; change one of them"
            )
        if max(self.tp_size, moe.ep_size) % min(self.tp_size, moe.ep_size):
            raise ConfigError(
                f"moe_ep.ep_size={moe.ep_size} with moe_ep.layout.tp_size={self.tp_size}: an expert group would hold "
                "parts of tensor groups; take sizes of which one divides the other"
            )
        if cuts_experts and model.expert_bias:
            raise ConfigError(
                f"moe_ep.model.expert_bias=true with moe_ep.layout.tp_size={self.tp_size}: the sum over the tensor "
                "group would add the second bias once per rank; set it to false"
            )
        if self.size > 1 and moe.replicas:
            rule = "neither check-config nor plan knows slots of copies in a model that is cut"
            raise ConfigError(f"moe_ep.replicas={moe.replicas!r} with moe_ep.layout: {rule}; set it to 0")
        if self.size > 1 and moe.async_save:
            raise ConfigError("moe_ep.async_save=true with moe_ep.layout: DeepSpeed saves pipelines; set it to false")
        if self.size > 1 and moe.has_bias and moe.ep_size == 1:
            raise ConfigError(
                f"moe_ep.balance={moe.balance!r} with moe_ep.layout and ep_size=1: no engine moves the bias of experts "
                "that are cut; set it to 'aux_loss'"
            )
        if self.size > 1 and moe.balance_scope == "batch":
            raise ConfigError(
                "moe_ep.balance_scope='batch' with moe_ep.layout: several micro-batches are on their way in a "
                "pipeline, and none knows the load of the batch; set it to 'rank' or 'sequence'"
            )
        if moe.sequence_first:
            raise ConfigError(
                "moe_ep.sequence_first=true with moe_ep.model: its tokens are [batch, sequence, D]; set it to false"
            )
        if cuts_experts and moe.noise != "none":
            raise ConfigError(
                f"moe_ep.noise={moe.noise!r} with moe_ep.layout.tp_size={self.tp_size}: the ranks of a tensor group "
                "would route alike tokens differently; set it to 'none'"
            )


SPECIFICATION = ModelConfig()
SMALL = ModelConfig(hidden_size=128, num_heads=8, expert_width=512, sequence_length=128, recompute=False)
MEDIUM = ModelConfig(  # the widths of DeepSeekMoE 16B (arXiv 2401.06066), whose routed experts are these
    num_layers=24, hidden_size=2048, num_heads=16, expert_width=1408, expert="swiglu", sequence_length=2048
)
MODELS: dict[str, ModelConfig] = {"specification": SPECIFICATION, "medium": MEDIUM, "small": SMALL}
