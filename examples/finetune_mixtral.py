"""Hugging Face's Trainer on a Mixtral whose experts AutoEP spreads over the ranks, with their traffic hidden.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/finetune_mixtral.py
    deepspeed --num_gpus 4 examples/finetune_mixtral.py --model /path/to/a/model    # a folder of save_pretrained

`Overlap`, a TrainerCallback, makes the difference; with --no-overlap the same losses are printed. Without --model
a tiny random Mixtral is trained; --save writes the trained model, experts of all ranks, as a folder of Hugging Face's.
A token is a byte: put your own tokenizer and data in the place of `sequences_of`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, training_batch

TOKENS = 64  # bytes of a sequence: a token is a byte


def main() -> None:
    args = parse_arguments()
    ds_moe_ep.init_distributed(verbose=False)
    train(args)
    torch.distributed.destroy_process_group()


def train(args: argparse.Namespace) -> PreTrainedModel:
    """A run of the Trainer, and its model. Collective over the world."""
    torch.manual_seed(0)
    sequences = sequences_of(load_corpus().train)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(args.model)
        trainer = Trainer(model, training_arguments(args, model, folder), train_dataset=sequences)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Losses())
        if not args.no_overlap:
            trainer.add_callback(Overlap(trainer, args.schedule))
        trainer.train()
        if args.save:
            trainer.save_model(args.save)
    return model


class Overlap(TrainerCallback):
    """Hooks the MoE layers as soon as there is an engine, and tells at the end what the hooks did."""

    def __init__(self, trainer: Trainer, schedule: str) -> None:
        self.trainer, self.knobs = trainer, {"schedule": schedule, "meter_every": 4}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle = ds_moe_ep.attach_overlap(self.trainer.model_wrapped, self.knobs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(self.handle, self.trainer.model_wrapped.moe_ep_meter.report(), sep="\n", flush=True)


class Losses(TrainerCallback):
    """The world's loss of each step, in full."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} | loss {float(logs['loss']):.6f}", flush=True)


def sequences_of(text: Tensor, count: int = 2048) -> list[dict[str, Tensor]]:
    """Windows of a text, the same in every run."""
    ids, _ = training_batch(text, (count, TOKENS), seed=0, step=0, first=0, num_sequences=count)
    return [{"input_ids": row, "labels": row} for row in ids]


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
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": int(os.environ["WORLD_SIZE"]), "preset_model": family},
        "bf16": {"enabled": torch.cuda.is_available()},
    }


def training_arguments(args: argparse.Namespace, model: PreTrainedModel, folder: str) -> TrainingArguments:
    """The Trainer's settings."""
    batch = {"per_device_train_batch_size": 4, "max_steps": args.steps, "learning_rate": 3e-3}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    quiet["use_cpu"] = not torch.cuda.is_available()
    quiet["bf16"] = torch.cuda.is_available()
    return TrainingArguments(folder, deepspeed=ds_config(args.zero_stage, model.config.model_type), **batch, **quiet)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face folder of a model that AutoEP knows")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4))
    parser.add_argument("--schedule", default="auto", help="of the transfers: auto, peers, chunks or serial")
    parser.add_argument("--save", metavar="PATH", help="a folder for the trained model; without one it is not kept")
    parser.add_argument("--no-overlap", action="store_true", help="train with AutoEP's own, blocking all-to-all calls")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
