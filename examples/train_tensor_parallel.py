"""Tensor parallelism of the dense part beside expert parallelism: attention cut over two ranks, experts over all.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/train_tensor_parallel.py

DeepSpeed's section "tensor_parallel" (AutoTP) cuts the matrices that it names. Nothing is to be set for the experts:
the ranks of a tensor group hold the same tokens, and each takes its share of them to the experts. With Megatron's own
layers pass its mpu to `ds_moe_ep.initialize`. A token is a byte: put your own data in the place of `micro_batches`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, micro_batches

TENSOR_RANKS, TOKENS, WIDTH, HEAD, EXPERTS = 2, 64, 64, 16, 8


class Attention(nn.Module):
    """Heads over the bytes before; a tensor rank has as many of them as its part of the matrices holds."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Bytes and next bytes, both [batch, tokens], to the loss: two blocks of attention and experts."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        config = ds_moe_ep.MoEConfig(num_experts=EXPERTS, ep_size=ep_size)
        expert = ds_moe_ep.GeluMLP(WIDTH, 2 * WIDTH)
        self.experts = nn.ModuleList(ds_moe_ep.MoE(WIDTH, expert, config=config) for _ in range(2))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, routing = self.embed(ids), 0.0
        for index, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            y, l_aux, _ = experts(self.norms[2 * index + 1](x))
            x, routing = x + y, routing + l_aux
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten()) + routing


def ds_config() -> dict[str, Any]:
    """Configuration of DeepSpeed: columns of the first matrices of attention and rows of its last are shared."""
    cut = [
        {"patterns": [r".*\.(query|key|value)\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.out\.weight$"], "partition_type": "row"},
    ]
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "tensor_parallel": {
            "autotp_size": TENSOR_RANKS,
            "partition_config": {"use_default_specs": False, "layer_specs": cut},
        },
        "moe_ep": {"top_k": 2},
    }


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    copy, num_copies = dist.get_rank() // TENSOR_RANKS, dist.get_world_size() // TENSOR_RANKS
    torch.manual_seed(0)  # the whole matrices are alike on all ranks before they are cut
    model = Model(ep_size=dist.get_world_size())
    torch.manual_seed(1 + dist.get_rank())  # each rank has experts of its own
    for layer in model.experts:
        for expert in layer.deepspeed_moe.experts.parameters():
            nn.init.normal_(expert, std=0.05)
    engine, *_ = ds_moe_ep.initialize(model=model, config=ds_config())
    text, size = load_corpus().train, (engine.train_micro_batch_size_per_gpu(), TOKENS)
    for step in range(args.steps):
        share = {"rank": copy, "num_ranks": num_copies, "accumulation": 1}
        for ids, targets in micro_batches(text, size, seed=0, step=step, **share):
            loss = engine(ids.to(engine.device), targets.to(engine.device))
            engine.backward(loss)
            engine.step()
        if dist.get_rank() == 0:
            print(f"step {step + 1} | loss {float(loss.detach()):.4f}", flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    ds_moe_ep.init_distributed(verbose=False)
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
