"""What attention keeps for its backward pass: the sizes of `AttentionShape` beside the storages that autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.attention_shape import AttentionShape
from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.model.attention import CausalAttention, rotation_of
from ds_moe_ep.sizing.footprint import activation_bytes
from tests.sizing.test_footprint import TINY, train

WIDTH, HEADS, TOKENS = 128, 8, 256


def saved_columns(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> float:
    """Numbers per token of all storages that a forward pass saves, beside its input and the parameters."""
    x_BSD = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x_BSD)
    others = [x_BSD, *layer.parameters()]
    apart = {tensor.untyped_storage().data_ptr() for tensor in others}
    return sum(each.untyped_storage().nbytes() for at, each in found.items() if at not in apart) / (4 * TOKENS)


def test_heads_as_wide_as_a_token_save_what_is_counted() -> None:
    layer = CausalAttention(WIDTH, HEADS)
    rotation = rotation_of(TOKENS, WIDTH // HEADS, torch.device("cpu"))
    found = saved_columns(layer, lambda x_BSD: layer(x_BSD, rotation))
    assert found == pytest.approx(AttentionShape.whole(WIDTH).saved_width, rel=0.1)


def hugging_face(attention: type[nn.Module], rotary: type[nn.Module], config: Any) -> float:
    """The same of a layer of transformers'."""
    config._attn_implementation = "sdpa"
    layer, place = attention(config, 0), torch.arange(TOKENS).unsqueeze(0)
    angles = rotary(config)(torch.empty(1, TOKENS, WIDTH), place)
    return saved_columns(layer, lambda x: layer(x, position_embeddings=angles, attention_mask=None)[0])


@pytest.mark.slow
def test_latent_heads_save_what_is_counted() -> None:
    """DeepSeek-V3's attention as transformers has it; values as wide as keys, so that the CPU's flash kernel runs."""
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as of

    config = DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=48, kv_lora_rank=16,
        qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
    )  # fmt: skip
    found = hugging_face(of.DeepseekV3Attention, of.DeepseekV3RotaryEmbedding, config)
    shape = AttentionShape.latent(
        WIDTH, HEADS, query_rank=48, key_value_rank=16, plain_size=48, rotated_size=16, value_size=64
    )
    assert found == pytest.approx(shape.saved_width, rel=0.1)
    assert found > 2 * AttentionShape.whole(WIDTH).saved_width, "the control: heads as wide as a token"


@pytest.mark.slow
def test_shared_keys_and_values_save_what_is_counted() -> None:
    """Qwen3's, which has norms of queries and keys."""
    pytest.importorskip("transformers")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe import modeling_qwen3_moe as of

    config = Qwen3MoeConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=32)
    found = hugging_face(of.Qwen3MoeAttention, of.Qwen3MoeRotaryEmbedding, config)
    shape = AttentionShape.grouped(WIDTH, HEADS, num_key_value_heads=2, head_size=32, has_norms=True)
    assert found == pytest.approx(shape.saved_width, rel=0.1)


class LatentModel(ModelConfig):
    """A model with latent heads."""

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape.latent(
            self.hidden_size, 2, query_rank=4, key_value_rank=4, plain_size=8, rotated_size=4, value_size=8
        )


def test_the_memory_of_a_job_has_its_attentions_columns() -> None:
    """By hand, of two layers of 6 tokens in fp32: 12 + 8 latent columns, 2 x 24 of q and k, 32, 2 x 16 of heads."""
    moe, training = MoEConfig(ep_size=16), train(16, 16)
    own, latent = (activation_bytes(kind(**vars(TINY)), moe, training) for kind in (ModelConfig, LatentModel))
    assert latent - own == 2 * 6 * 4 * (12 + 8 + 2 * 24 + 32 + 2 * 16 - 7 * 8)
