"""Hugging Face's Trainer on a model with this package's MoE layers.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/train_with_trainer.py

The section "moe_ep" is in force as it stands. `attach_overlap` adds the watch, safe checkpoints and the meter. --output
keeps the checkpoints, and a model file in each, which hold the experts of all ranks; the same command goes on from the
last one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, training_batch

TOKENS, WIDTH, NUM_EXPERTS = 32, 32, 8
DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "moe_ep": {"top_k": 2, "balance": "bias", "schedule": "peers", "meter_every": 4},
}


class Model(nn.Module):
    """Guesses the next byte from the one before it: two blocks of experts between an embedding and a head."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        config = ds_moe_ep.MoEConfig(num_experts=NUM_EXPERTS, ep_size=ep_size)
        expert = ds_moe_ep.GeluMLP(WIDTH, 2 * WIDTH)
        self.blocks = nn.ModuleList(ds_moe_ep.MoE(WIDTH, expert, config=config) for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        balance = x.new_zeros(())
        for block in self.blocks:
            y, l_aux, _ = block(x)
            x, balance = x + y, balance + l_aux
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + balance, "logits": logits}


class Overlap(TrainerCallback):
    """Gives the engine its extensions as soon as there is one, and tells at the end what was hidden."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle = ds_moe_ep.attach_overlap(self.trainer.model_wrapped)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(self.handle, self.trainer.model_wrapped.moe_ep_meter.report(), sep="\n", flush=True)


class Losses(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} | loss {float(logs['loss']):.6f}", flush=True)


def train(args: argparse.Namespace) -> nn.Module:
    """A run of the Trainer, and its model. Collective over the world."""
    folder = args.output or tempfile.gettempdir()  # nothing is written without --output
    torch.manual_seed(torch.distributed.get_rank())  # each rank draws its own experts; DeepSpeed makes the rest alike
    inputs, labels = training_batch(load_corpus().train, (2048, TOKENS), seed=0, step=0, first=0, num_sequences=2048)
    data = [{"input_ids": one, "labels": other} for one, other in zip(inputs, labels, strict=True)]
    batch = {"per_device_train_batch_size": 4, "max_steps": args.steps, "learning_rate": 1e-2}
    saving = {"save_strategy": "steps" if args.output else "no", "save_steps": args.save_every, "logging_steps": 1}
    saving |= {"report_to": [], "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    trainer = Trainer(
        Model(ep_size=int(os.environ["WORLD_SIZE"])),
        TrainingArguments(folder, deepspeed=DS_CONFIG, **batch, **saving),
        train_dataset=data,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Losses())
    if not args.plain:
        trainer.add_callback(Overlap(trainer))
    last = get_last_checkpoint(folder) if args.output and os.path.isdir(folder) else None
    trainer.train(resume_from_checkpoint=last)
    model: nn.Module = trainer.model
    return model


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=6)
    parser.add_argument("--output", help="the folder of the checkpoints; without one there are none")
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
