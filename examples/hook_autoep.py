"""A Hugging Face model under DeepSpeed alone: AutoEP spreads its experts, and one line more hides their traffic.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/hook_autoep.py
    deepspeed --num_gpus 4 examples/hook_autoep.py --model /path/to/a/model    # a folder of save_pretrained

With --no-overlap the same losses are printed. Without --model a tiny random Mixtral is trained. A token is a byte: put
your own tokenizer and data in the place of `training_batch`.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, training_batch

SEQUENCES, TOKENS = 4, 64  # of a rank's batch


def main() -> None:
    args = parse_arguments()
    ds_moe_ep.init_distributed(verbose=False)
    train(args)
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    torch.manual_seed(0)
    model = make_model(args.model)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config(model.config.model_type))
    knobs = {"schedule": args.schedule}
    with nullcontext() if args.no_overlap else ds_moe_ep.attach_overlap(engine, knobs) as handle:  # the one line
        text, share = (
            load_corpus().train,
            {"first": dist.get_rank() * SEQUENCES, "num_sequences": engine.train_batch_size()},
        )
        for step in range(args.steps):
            ids, _ = training_batch(text, (SEQUENCES, TOKENS), seed=0, step=step, **share)
            ids = ids.to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            dist.all_reduce(mean := loss.detach().clone() / dist.get_world_size())
            if dist.get_rank() == 0:
                print(f"step {step + 1} | loss {float(mean):.6f}", flush=True)
        if handle is not None and dist.get_rank() == 0:
            print(handle)


def make_model(path: str | None) -> PreTrainedModel:
    """The model of a Hugging Face folder, or a Mixtral of 8 experts with random weights."""
    if path is not None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_cache=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": TOKENS}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=256, use_cache=False, **sizes, **experts, **heads))


def ds_config(family: str) -> dict[str, Any]:
    """Configuration of DeepSpeed for a family of models that AutoEP knows."""
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": int(os.environ["WORLD_SIZE"]), "preset_model": family},
        "bf16": {"enabled": torch.cuda.is_available()},
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face folder of a model that AutoEP knows")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--schedule", default="auto", help="of the transfers: auto, peers, chunks or serial")
    parser.add_argument("--no-overlap", action="store_true", help="train with AutoEP's own, blocking all-to-all calls")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
