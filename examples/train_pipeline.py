"""A PipelineModule of one's own whose stages hold this package's MoE layers; the experts of a stage are its ranks'.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/train_pipeline.py

Two stages of two ranks each, in DeepSpeed's 1F1B order. A layer's routing loss must reach the last stage's loss: it
travels with the hidden states. A token is a byte: put your own tokenizer and data in the place of `micro_batches`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, micro_batches

TOKENS, WIDTH, EXPERTS, STAGES = 64, 64, 8, 2
Carried = tuple[Tensor, Tensor]  # hidden states, and the routing losses so far


class Embedding(nn.Module):
    """Bytes to hidden states, and no losses yet."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)

    def forward(self, ids: Tensor) -> Carried:
        x = self.embed(ids)
        return x, x.new_zeros(1)


class Block(nn.Module):
    """A mixture of experts that adds its routing loss to those before it. Each stage needs one."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        config = ds_moe_ep.MoEConfig(num_experts=EXPERTS, ep_size=ep_size)
        self.moe = ds_moe_ep.MoE(WIDTH, ds_moe_ep.GeluMLP(WIDTH, 2 * WIDTH), config=config)

    def forward(self, carried: Carried) -> Carried:
        x, losses = carried
        y, l_aux, _ = self.moe(self.norm(x))
        return x + y, losses + l_aux


class Head(nn.Module):
    """Hidden states to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, carried: Carried) -> Carried:
        x, losses = carried
        return self.head(x), losses


def loss_fn(carried: Carried, targets: Tensor) -> Tensor:
    """The last stage's loss; the routing losses come weighted."""
    logits, losses = carried
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) + losses.sum()


def ds_config() -> dict[str, Any]:
    """Configuration of DeepSpeed; ZeRO 0 and 1 work in stages."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "moe_ep": {"top_k": 2},
    }


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    torch.manual_seed(dist.get_rank())  # each rank draws its own experts; DeepSpeed makes the rest alike
    ep_size = dist.get_world_size() // STAGES  # up to the ranks of a stage
    layers = [LayerSpec(Embedding), *(LayerSpec(Block, ep_size) for _ in range(2)), LayerSpec(Head)]
    net = PipelineModule(layers, num_stages=STAGES, loss_fn=loss_fn, partition_method="uniform")
    engine, *_ = ds_moe_ep.initialize(model=net, config=ds_config())
    text, size = load_corpus().train, (engine.train_micro_batch_size_per_gpu(), TOKENS)
    share = {
        "rank": engine.grid.get_data_parallel_rank(),
        "num_ranks": engine.grid.get_data_parallel_world_size(),
        "accumulation": engine.gradient_accumulation_steps(),
    }
    for step in range(args.steps):
        loss = engine.train_batch(micro_batches(text, size, seed=0, step=step, **share))
        if dist.get_rank() == 0:
            print(f"step {step + 1} | loss {float(loss):.4f}", flush=True)


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
