"""A Megatron-DeepSpeed style GPT, whose layers hold DeepSpeed's MoE, with the experts' traffic hidden: one line more.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/hook_megatron_moe.py

The model is written as Megatron-DeepSpeed writes it: tokens as [sequence, batch, width], an MLP that returns its output
and a bias, a layer that returns its output and the MoE loss. With --no-overlap the same losses are printed.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, training_batch

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": True}},
}
SEQUENCE, WIDTH, HEADS, EXPERTS, LAYERS, MOE_LOSS = 64, 64, 4, 8, 2, 0.01


class ParallelMLP(nn.Module):
    """Megatron's feed-forward: its second bias is returned beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(WIDTH, 4 * WIDTH)
        self.dense_4h_to_h = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        inner = nn.functional.gelu(self.dense_h_to_4h(hidden))
        return nn.functional.linear(inner, self.dense_4h_to_h.weight), self.dense_4h_to_h.bias


class ParallelTransformerLayer(nn.Module):
    """Attention and a mixture of experts; returns the hidden states [s, b, h] and the MoE loss."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS)
        self.mlp = MoE(WIDTH, ParallelMLP(), num_experts=EXPERTS, ep_size=ep_size, k=1, capacity_factor=1.25)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        mlp_output, moe_loss, _ = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + mlp_output, moe_loss


class GPTModel(nn.Module):
    """Bytes and next bytes, both [b, s], to the loss, the MoE losses of all layers included."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(256, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        nn.init.normal_(self.word_embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(ParallelTransformerLayer(ep_size) for _ in range(LAYERS))
        self.final_layernorm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.word_embeddings(tokens.t()) + self.position_embeddings.weight[:, None]
        mask = torch.full((SEQUENCE, SEQUENCE), float("-inf"), dtype=hidden.dtype, device=hidden.device).triu(1)
        moe_losses = hidden.new_zeros(())
        for layer in self.layers:
            hidden, moe_loss = layer(hidden, mask)
            moe_losses = moe_losses + moe_loss
        logits = self.final_layernorm(hidden) @ self.word_embeddings.weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.t().flatten()) + MOE_LOSS * moe_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--no-overlap", action="store_true", help="train without the hooks")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    args = parser.parse_args()
    ds_moe_ep.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = GPTModel(ep_size=dist.get_world_size())
    parameters = [{"name": "all", "params": list(model.parameters())}]
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(parameters)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=DS_CONFIG)
    with nullcontext() if args.no_overlap else ds_moe_ep.attach_overlap(engine) as handle:  # the one line
        train(engine, args.steps)
        if handle is not None and dist.get_rank() == 0:
            print(handle)
    dist.destroy_process_group()


def train(engine: deepspeed.DeepSpeedEngine, num_steps: int) -> None:
    """Trains on the text of Python's library; rank 0 prints the loss of its own batch."""
    text, size = load_corpus().train, (engine.train_micro_batch_size_per_gpu(), SEQUENCE)
    share = {"first": dist.get_rank() * size[0], "num_sequences": engine.train_batch_size()}
    for step in range(num_steps):
        batch = training_batch(text, size, seed=0, step=step, **share)
        loss = engine(*(ids.to(engine.device) for ids in batch))
        engine.backward(loss)
        engine.step()
        if (step + 1) % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step + 1} | loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
