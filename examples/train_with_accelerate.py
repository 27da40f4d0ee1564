"""A loop of one's own through Hugging Face's Accelerate, on a model with this package's MoE layers.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/train_with_accelerate.py

The section "moe_ep" is in force as it stands. `attach_overlap` adds the watch, safe checkpoints and the meter.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch import Tensor, nn

import ds_moe_ep

WIDTH = 16
DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "moe_ep": {"balance": "bias", "schedule": "peers"},
}


class Classifier(nn.Module):
    """A block of 8 experts and a head."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        config = ds_moe_ep.MoEConfig(num_experts=8, ep_size=ep_size)
        self.moe = ds_moe_ep.MoE(WIDTH, ds_moe_ep.GeluMLP(WIDTH, 2 * WIDTH), config=config)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y, l_aux, _ = self.moe(x)
        return nn.functional.cross_entropy(self.head(x + y), labels) + l_aux


def train(args: argparse.Namespace) -> nn.Module:
    """A run of the loop, and its model. Collective over the world."""
    # On a CPU, Accelerator() alone takes each rank for the only one, and Accelerator(cpu=True) leaves DeepSpeed out.
    PartialState(cpu=not torch.cuda.is_available())
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=DS_CONFIG))
    torch.manual_seed(accelerator.process_index)  # each rank draws its own experts; DeepSpeed makes the rest alike
    model = Classifier(ep_size=int(os.environ["WORLD_SIZE"]))
    engine, _ = accelerator.prepare(model, DummyOptim(model.parameters()))  # DeepSpeed makes the real optimizer
    handle = None if args.plain else ds_moe_ep.attach_overlap(engine, {"meter_every": 4})
    centers = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).to(accelerator.device)
    for step in range(1, args.steps + 1):
        labels = torch.randint(4, (32,), device=accelerator.device)
        loss = engine(centers[labels] + 0.5 * torch.randn(32, WIDTH, device=accelerator.device), labels)
        accelerator.backward(loss)  # and the optimizer's step, which is the engine's
        accelerator.print(f"step {step} | loss {float(accelerator.reduce(loss.detach(), 'mean')):.6f}", flush=True)
    if args.output:
        accelerator.save_state(args.output)  # the experts of all ranks; accelerator.load_state goes on from there
    if handle is not None:
        accelerator.print(handle, engine.moe_ep_meter.report(), sep="\n")
        handle.remove()
    return model


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", help="where accelerator.save_state saves the run at its end")
    parser.add_argument("--plain", action="store_true", help="train without attach_overlap: the same losses")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    ds_moe_ep.init_distributed()
    train(args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
