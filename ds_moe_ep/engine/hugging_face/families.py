"""Names and routing of Hugging Face's MoE families: one row per family, no code per family.

Names are those of the files on the hub, which every release of transformers reads: one tensor per expert and
projection, those of silu(gate(x)) * up(x), then down; gpt-oss's hold a block's experts together (`stacks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ds_moe_ep.errors import ConfigError, nearest

STACKS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # of a family whose experts are stacked
Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How files name an MoE block of a family, and which attributes of its configuration route tokens.

    Names are relative to the block; `module` is the block's name in a decoder layer, `file` the same in files.
    `renormalizes` is the attribute that says whether the k weights are divided by their sum; "" where they always are,
    None where they never are.
    """

    model_type: str
    module: str = "mlp"
    file: str = "mlp"
    router: str = "gate.weight"
    router_bias: str = ""  # moves the choice and nothing else
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    shared_gate: str = ""
    num_experts: str = "num_experts"
    expert_width: str = "moe_intermediate_size"
    shared_width: str = ""
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalizes: str | None = ""
    shared_count: str = ""  # of expert widths that its shared expert has; "" where `shared_width` is its own
    limits_groups: bool = False  # n_group, topk_group and routed_scaling_factor; not where its topk_method is "greedy"
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    gate_bias: str = ""  # of the router's product
    stacked: bool = False  # all experts of a block in one tensor per part, with biases; clamped SwiGLU (gpt-oss)
    gives_scores: bool = False  # the block's answer is (hidden states, scores)

    def expert(self, index: int, projection: Projection) -> str:
        """The name of one projection of one expert."""
        return f"experts.{index}.{self.projections[PROJECTIONS.index(projection)]}.weight"

    def stack(self, part: str) -> str:
        """The name of a tensor that holds a part of all experts."""
        return f"experts.{part}"

    def in_files(self, block: str) -> str:
        """The block's name in files, for its name in the model."""
        return f"{block.removesuffix(self.module)}{self.file}"

    def names(self, num_experts: int) -> Iterator[str]:
        """Every name of a block in files."""
        yield self.router
        yield from filter(None, (self.router_bias, self.gate_bias))
        if self.stacked:
            yield from map(self.stack, STACKS)
        for index in range(0 if self.stacked else num_experts):
            for projection in PROJECTIONS:
                yield self.expert(index, projection)
        if self.shared:
            yield from (f"{self.shared}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
        if self.shared_gate:
            yield f"{self.shared_gate}.weight"


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",
            file="block_sparse_moe",
            projections=("w1", "w3", "w2"),
            num_experts="num_local_experts",
            expert_width="intermediate_size",
        ),
        Family(
            model_type="qwen2_moe",
            shared="shared_expert",
            shared_gate="shared_expert_gate",
            shared_width="shared_expert_intermediate_size",
            renormalizes="norm_topk_prob",
        ),
        Family(model_type="qwen3_moe", renormalizes="norm_topk_prob"),
        Family(model_type="olmoe", expert_width="intermediate_size", renormalizes="norm_topk_prob"),
        Family(
            model_type="deepseek_v2",
            shared="shared_experts",
            num_experts="n_routed_experts",
            shared_width="moe_intermediate_size",
            shared_count="n_shared_experts",
            renormalizes=None,
            limits_groups=True,
            group_score="max",
        ),
        *(
            Family(
                model_type=model_type,
                router_bias="gate.e_score_correction_bias",
                shared="shared_experts",
                num_experts="n_routed_experts",
                shared_width="moe_intermediate_size",
                shared_count="n_shared_experts",
                score="sigmoid",
                renormalizes="norm_topk_prob",
                limits_groups=True,
            )
            for model_type in ("deepseek_v3", "glm4_moe", "dots1")
        ),
        Family(
            model_type="gpt_oss",
            router="router.weight",
            gate_bias="router.bias",
            num_experts="num_local_experts",
            expert_width="intermediate_size",
            stacked=True,
            gives_scores=True,
        ),
    )
}

PACKED = "gpt-oss's own files: make them plain with transformers (Mxfp4Config(dequantize=True), then save_pretrained)"


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration. Raises ConfigError for one that has no row here."""
    model_type = str(getattr(config, "model_type", ""))
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            "config.quantization_config: the files hold weights of fewer bits, which no layer here trains; take plain "
            f"ones. {PACKED}"
        )
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.model_type={model_type!r}: files of this family are not known here; "
            f"{nearest(model_type, FAMILIES, 'families')}"
        )
    return FAMILIES[model_type]
