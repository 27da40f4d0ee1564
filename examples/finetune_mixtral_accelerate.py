"""A training loop of one's own through Hugging Face's Accelerate, on a Mixtral whose experts AutoEP spreads.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/finetune_mixtral_accelerate.py
    deepspeed --num_gpus 4 examples/finetune_mixtral_accelerate.py --model /path/to/a/model

What `accelerator.prepare` returns is DeepSpeed's engine: `attach_overlap` takes it as it is. Without --model a tiny
random Mixtral is trained. A token is a byte: put your own tokenizer and data in the place of `batches_of`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, training_batch

TOKENS = 64  # bytes of a sequence


def main() -> None:
    args = parse_arguments()
    ds_moe_ep.init_distributed(verbose=False)
    train(args)
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    torch.manual_seed(0)
    model = make_model(args.model)
    plugin = DeepSpeedPlugin(hf_ds_config=ds_config(args.zero_stage, model.config.model_type))
    # On a CPU, Accelerator() alone takes each rank for the only one, and Accelerator(cpu=True) leaves DeepSpeed out.
    PartialState(cpu=not torch.cuda.is_available())
    accelerator = Accelerator(deepspeed_plugin=plugin)
    optimizer = DummyOptim(model.parameters(), lr=3e-3, weight_decay=0.0)  # DeepSpeed makes the real one
    engine, optimizer, batches = accelerator.prepare(model, optimizer, batches_of())
    handle = None if args.no_overlap else ds_moe_ep.attach_overlap(engine, {"schedule": args.schedule})
    for step, batch in zip(range(1, args.steps + 1), batches, strict=False):
        loss = engine(**batch).loss
        accelerator.backward(loss)  # and the optimizer's step, which is the engine's
        mean = accelerator.reduce(loss.detach(), "mean")
        if accelerator.is_main_process:
            print(f"step {step} | loss {float(mean):.6f}", flush=True)
    if handle is not None:
        accelerator.print(handle)
        handle.remove()


def batches_of(count: int = 2048) -> DataLoader[Any]:
    """Windows of a text, the same in every run."""
    text = load_corpus().train
    ids, _ = training_batch(text, (count, TOKENS), seed=0, step=0, first=0, num_sequences=count)
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)


def make_model(path: str | None) -> PreTrainedModel:
    """The model of a Hugging Face folder, or a Mixtral of 8 experts with random weights."""
    if path is not None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_cache=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": TOKENS}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=256, use_cache=False, **sizes, **experts, **heads))


def ds_config(zero_stage: int, family: str) -> dict[str, Any]:
    """Configuration of DeepSpeed for a family of models that AutoEP knows; "auto" leaves a value to Hugging Face."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": int(os.environ["WORLD_SIZE"]), "preset_model": family},
        "bf16": {"enabled": torch.cuda.is_available()},
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face folder of a model that AutoEP knows")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4))
    parser.add_argument("--schedule", default="auto", help="of the transfers: auto, peers, chunks or serial")
    parser.add_argument("--no-overlap", action="store_true", help="train with AutoEP's own, blocking all-to-all calls")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
