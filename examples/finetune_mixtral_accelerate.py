"""The Mixtral of finetune_mixtral.py in a training loop of one's own, through Hugging Face's Accelerate.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/finetune_mixtral_accelerate.py

What `accelerator.prepare` returns is DeepSpeed's engine: `attach_overlap` takes it as it is.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from finetune_mixtral import ds_config, make_model, parse_arguments, sequences_of
from torch.utils.data import DataLoader
from world import set_up_process

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus


def main() -> None:
    args = parse_arguments(__doc__)
    set_up_process()
    train(args)
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    torch.manual_seed(0)
    plugin = DeepSpeedPlugin(hf_ds_config={**ds_config(args.zero_stage), "gradient_accumulation_steps": 1})
    # On a CPU, Accelerator() alone takes each rank for the only one, and Accelerator(cpu=True) leaves DeepSpeed out.
    PartialState(cpu=not torch.cuda.is_available())
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = make_model()
    optimizer = DummyOptim(model.parameters(), lr=3e-3, weight_decay=0.0)  # DeepSpeed makes the real one
    sequences = DataLoader(sequences_of(load_corpus().train), batch_size=4)
    engine, optimizer, sequences = accelerator.prepare(model, optimizer, sequences)
    handle = None if args.no_overlap else ds_moe_ep.attach_overlap(engine, {"schedule": args.schedule})
    for step, batch in zip(range(1, args.steps + 1), sequences, strict=False):
        loss = engine(**batch).loss
        accelerator.backward(loss)  # and the optimizer's step, which is the engine's
        mean = accelerator.reduce(loss.detach(), "mean")
        if accelerator.is_main_process:
            print(f"step {step} | loss {float(mean):.6f}", flush=True)
    if handle is not None:
        accelerator.print(handle)
        handle.remove()


if __name__ == "__main__":
    main()
