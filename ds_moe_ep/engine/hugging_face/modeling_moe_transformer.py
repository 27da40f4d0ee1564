"""The causal language model of a folder, for Hugging Face: plain torch and transformers, on one device.

Pre-norm layers of causal attention with rotary positions and a mixture of experts. This file goes into the folder
beside the weights; `from_pretrained(folder, trust_remote_code=True)` reads it. It computes without a cache and has no
balance loss. Shapes: B sequences, S tokens of one, T tokens in all, D width, H width of one head, E experts, K choices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

_Config: Any = PretrainedConfig  # their methods have no types in most releases
_Model: Any = PreTrainedModel
_Generates: Any = GenerationMixin
_Output: Any = CausalLMOutput
ROTARY_BASE = 10_000.0


class MoETransformerConfig(_Config):
    """Sizes of the model, and how its gate chooses."""

    model_type = "ds_moe_ep_transformer"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 10_000,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        expert: str = "gelu",
        expert_width: int = 128,
        expert_bias: bool = False,
        shared_expert_width: int = 0,
        score: str = "softmax",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2_sum",
        gate_bias: bool = False,
        routing_bias: bool = False,
        **rest: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.expert, self.expert_width, self.expert_bias = expert, expert_width, expert_bias
        self.shared_expert_width = shared_expert_width
        self.score, self.norm_topk_prob, self.routed_scaling_factor = score, norm_topk_prob, routed_scaling_factor
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.gate_bias, self.routing_bias = gate_bias, routing_bias
        rest.setdefault("tie_word_embeddings", False)
        rest.setdefault("use_cache", False)
        super().__init__(**rest)


class _Gelu(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, width, bias=config.expert_bias)
        self.fc2 = nn.Linear(width, config.hidden_size, bias=config.expert_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class _SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), then down."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, width, bias=config.expert_bias)
        self.up = nn.Linear(config.hidden_size, width, bias=config.expert_bias)
        self.down = nn.Linear(width, config.hidden_size, bias=config.expert_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class _Gate(nn.Module):
    """Logits and scores in fp32; the best experts by score and bias, of the best groups; weights by score alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=config.gate_bias)
        if config.routing_bias:
            self.routing_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' ids and their weights, both [T, K]."""
        config = self.config
        bias = None if self.wg.bias is None else self.wg.bias.float()
        logits_TE = F.linear(x_TD.float(), self.wg.weight.float(), bias)
        scores_TE = logits_TE.softmax(1) if config.score == "softmax" else logits_TE.sigmoid()
        choice_TE = scores_TE + self.routing_bias.float() if config.routing_bias else scores_TE
        if config.n_group > 1:
            choice_TE = choice_TE.masked_fill(self._outside(choice_TE), float("-inf"))
        expert_ids_TK = choice_TE.topk(config.num_experts_per_tok, dim=1).indices
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        return expert_ids_TK, weights_TK * config.routed_scaling_factor

    def _outside(self, choice_TE: Tensor) -> Tensor:
        by_group = choice_TE.unflatten(1, (self.config.n_group, -1))
        is_sum = self.config.group_score == "top2_sum"
        best = by_group.topk(2, dim=2).values.sum(2) if is_sum else by_group.amax(2)
        visited = best.topk(self.config.topk_group, dim=1).indices
        is_outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, visited, False)
        return is_outside.repeat_interleave(by_group.shape[2], dim=1)


class _FeedForward(nn.Module):
    """A mixture of experts, and an expert that every token visits where there is one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        make = _SwiGLU if config.expert == "swiglu" else _Gelu
        self.gate = _Gate(config)
        self.experts = nn.ModuleList(make(config, config.expert_width) for _ in range(config.num_experts))
        if config.shared_expert_width:
            self.shared = make(config, config.shared_expert_width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        expert_ids_TK, weights_TK = self.gate(x_TD)
        sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for index, expert in enumerate(self.experts):
            tokens, choices = (expert_ids_TK == index).nonzero(as_tuple=True)
            if len(tokens):
                rows = expert(x_TD[tokens]).float() * weights_TK[tokens, choices, None]
                sum_TD = sum_TD.index_add(0, tokens, rows)
        y_TD = sum_TD.to(x_TD.dtype)
        if hasattr(self, "shared"):
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x_BSD.shape)


class _Attention(nn.Module):
    """Causal self-attention; the rows of `qkv` lie head by head, query, key and value of each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        packed = self.qkv(x_BSD).unflatten(-1, (-1, 3, self.head_size))
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(3))  # [B, heads, S, H]
        query, key = _turned(query), _turned(key)
        gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        y_BSD: Tensor = self.out(gathered.transpose(1, 2).flatten(2))
        return y_BSD


def _turned(x: Tensor) -> Tensor:
    """Queries or keys [B, heads, S, H], each pair (i, i + H/2) turned by its position's angle, in fp32."""
    num_positions, head_size = x.shape[-2:]
    pair = torch.arange(0, head_size, 2, dtype=torch.float32, device=x.device)
    position = torch.arange(num_positions, dtype=torch.float32, device=x.device)
    angle = position[:, None] * ROTARY_BASE ** (-pair / head_size)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = _Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = _FeedForward(config)

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask)
        y_BSD: Tensor = x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
        return y_BSD


class MoETransformerForCausalLM(_Model, _Generates):
    """The model with its head; `loss` is the cross-entropy of the next token where labels are given."""

    config_class = MoETransformerConfig
    base_model_prefix = ""
    _keep_in_fp32_modules_strict = ("routing_bias",)
    _no_split_modules = ["_Layer"]  # noqa: RUF012 (transformers reads a list)

    def __init__(self, config: MoETransformerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.head = new_embeddings

    def prepare_inputs_for_generation(self, input_ids: Tensor, **given: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": given.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Logits [B, S, V]. `attention_mask` [B, S] is zero for padding, `labels` are the tokens (-100: none)."""
        num_tokens = input_ids.shape[1]
        if num_tokens > self.config.max_position_embeddings:
            most = self.config.max_position_embeddings
            raise ValueError(f"a sequence of {num_tokens} tokens is longer than max_position_embeddings={most}: cut it")
        x_BSD = self.embedding(input_ids)
        mask = _mask(attention_mask, num_tokens)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask)
        logits = self.head(self.final_norm(x_BSD))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return _Output(loss=loss, logits=logits)


def _mask(attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """True for what each token may look at, [B, 1, S, S]; None where that is itself and every token before it."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=attention_mask.device).tril()
    seen = causal & attention_mask[:, None, None].bool()
    return seen | torch.eye(num_tokens, dtype=torch.bool, device=seen.device)  # padding looks at itself: no NaN
