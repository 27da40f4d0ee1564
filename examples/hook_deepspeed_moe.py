"""A DeepSpeed model that keeps DeepSpeed's MoE layers, with their traffic hidden: one line more.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/hook_deepspeed_moe.py

With --no-overlap the same losses are printed.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

import ds_moe_ep

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": True}},
}


class Classifier(nn.Module):
    """Two MoE layers of 8 experts, as a user of DeepSpeed writes them."""

    def __init__(self, width: int, num_classes: int, ep_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(2):
            expert = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            self.layers.append(MoE(width, expert, num_experts=8, ep_size=ep_size, k=1, drop_tokens=False))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        l_aux_sum = x.new_zeros(())
        for layer in self.layers:
            y, l_aux, _ = layer(x)
            x, l_aux_sum = x + y, l_aux_sum + l_aux
        return nn.functional.cross_entropy(self.head(x), labels) + 0.01 * l_aux_sum


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    torch.manual_seed(0)
    centers, width = torch.randn(32, 16), 16
    model = Classifier(width, num_classes=4, ep_size=dist.get_world_size())
    parameters = [{"name": "all", "params": list(model.parameters())}]
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(parameters)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=DS_CONFIG)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with nullcontext() if args.no_overlap else ds_moe_ep.attach_overlap(engine) as handle:  # the one line
        for step in range(1, args.steps + 1):
            cluster = torch.randint(32, (64,), generator=generator)
            points = centers[cluster] + 0.3 * torch.randn(64, width, generator=generator)
            loss = engine(points.to(engine.device), (cluster % 4).to(engine.device))
            engine.backward(loss)
            engine.step()
            if step % 20 == 0 and dist.get_rank() == 0:
                print(f"step {step} | loss {loss.item():.4f}", flush=True)
        if handle is not None and dist.get_rank() == 0:
            print(handle)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--no-overlap", action="store_true", help="train without the hooks")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    ds_moe_ep.init_distributed(verbose=False)
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
