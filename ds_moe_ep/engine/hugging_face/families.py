"""Names and routing of Hugging Face's MoE families: one row per family, no code per family.

Names are those of the files on the hub, one tensor per expert and projection, which every release of transformers
reads. Projections are those of silu(gate(x)) * up(x), then down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ds_moe_ep.errors import ConfigError, nearest

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

    def expert(self, index: int, projection: Projection) -> str:
        """The name of one projection of one expert."""
        return f"experts.{index}.{self.projections[PROJECTIONS.index(projection)]}.weight"

    def in_files(self, block: str) -> str:
        """The block's name in files, for its name in the model."""
        return f"{block.removesuffix(self.module)}{self.file}"

    def names(self, num_experts: int) -> Iterator[str]:
        """Every name of a block in files."""
        yield self.router
        if self.router_bias:
            yield self.router_bias
        for index in range(num_experts):
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
    )
}

STACKED = {  # families whose files hold experts together
    "gpt_oss": (
        "its files hold a block's experts in one tensor, gate and up in turn, with biases; folders are read here with "
        "a name per expert and projection; make the model with ds_moe_ep.MoE, ClampedSwiGLU experts and gate_bias, and "
        "copy the weights (docs/adopt.md)"
    )
}


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration. Raises ConfigError for one that has no row here."""
    model_type = str(getattr(config, "model_type", ""))
    if model_type in STACKED:
        raise ConfigError(f"config.model_type={model_type!r}: {STACKED[model_type]}")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.model_type={model_type!r}: files of this family are not known here; "
            f"{nearest(model_type, FAMILIES, 'families')}"
        )
    return FAMILIES[model_type]
