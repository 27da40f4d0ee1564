"""Tiny Hugging Face models of every family in the table, in folders, in engines, and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY, NUM_EXPERTS = 64, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,  # large enough that the experts weigh in the output
    "use_cache": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 48},
    "qwen2_moe": {
        "num_experts": NUM_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56, "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": NUM_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "head_dim": 8, "tie_word_embeddings": True,
    },
    "olmoe": {"num_experts": NUM_EXPERTS, "intermediate_size": 24, "norm_topk_prob": False},
    "deepseek_v3": {
        "n_routed_experts": NUM_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "deepseek_v2": {
        "n_routed_experts": NUM_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 1, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "glm4_moe": {
        "n_routed_experts": NUM_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24, "n_shared_experts": 2,
        "routed_scaling_factor": 1.5, "norm_topk_prob": True, "first_k_dense_replace": 1, "head_dim": 8,
    },
    "dots1": {
        "n_routed_experts": NUM_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": False, "head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        "num_local_experts": NUM_EXPERTS, "intermediate_size": 24, "head_dim": 8, "sliding_window": 8,
        "swiglu_limit": 0.5,  # that some reach
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


def make_model(family: str, seed: int = 3, **changes: Any) -> Any:
    """The model with random weights, the routing bias of DeepSeek's included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    for name, parameter in model.named_parameters():
        if family == "gpt_oss" and "bias" in name:  # which begin at zero
            parameter.data.normal_(std=0.1)
    return model


def token_ids(seed: int = 7, count: int = 3) -> Tensor:
    """Sequences [count, 20]."""
    return torch.randint(VOCABULARY, (count, 20), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """The logits of `token_ids` outside of training."""
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=token_ids() if ids is None else ids).logits
    return found.float()


def load(folder: Path) -> Any:
    """The folder by Hugging Face, fp32; no key may be missing or unexpected."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: keys for kind, keys in told.items() if keys}
    assert not wrong, wrong
    return model


def ds_config(stage: int, autoep: dict[str, Any] | None = None) -> dict[str, Any]:
    """Adam with a step that is seen in every weight."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "eps": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    return config | ({"expert_parallel": {"enabled": True, **autoep}} if autoep else {})


def train_one_step(model: Any, config: dict[str, Any]) -> Any:
    """The engine of a model behind one optimizer step. Collective."""
    import deepspeed

    import ds_moe_ep

    deepspeed.utils.logger.setLevel(logging.ERROR)
    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
    engine.train()
    ids = token_ids(seed=20 + dist.get_rank())
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
