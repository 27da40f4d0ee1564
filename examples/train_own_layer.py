"""A model of one's own with this package's MoE layers, under any launcher, with the knobs of a ds_config.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 examples/train_own_layer.py --deepspeed_config ep4_cpu

--deepspeed_config takes a path, or the name of a ds_config that ships. Its section "moe_ep" says how many experts there
are per layer, and how rows travel. --save keeps a checkpoint, and --resume goes on from it. A token is a byte: put your
own tokenizer and data in the place of `micro_batches`.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_moe_ep
from ds_moe_ep.model.text import load_corpus, micro_batches

TOKENS, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nn.Module):
    """Attention over the bytes before, and a mixture of experts; returns the hidden states and the routing loss."""

    def __init__(self, config: ds_moe_ep.MoEConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = ds_moe_ep.MoE(WIDTH, ds_moe_ep.SwiGLU(WIDTH, 2 * WIDTH), config=config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y, l_aux, _ = self.moe(self.norms[1](x))
        return x + y, l_aux


class Model(nn.Module):
    """Bytes and next bytes, both [batch, tokens], to the loss; the routing losses come weighted."""

    def __init__(self, config: ds_moe_ep.MoEConfig) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(256, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(config) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, routing = self.embed(ids) + self.places.weight, 0.0
        for block in self.blocks:
            x, l_aux = block(x)
            routing = routing + l_aux
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten()) + routing


def train(args: argparse.Namespace) -> None:
    """A run of the loop. Collective over the world."""
    section = ds_moe_ep.read_section(ds_moe_ep.load_ds_config(args.deepspeed_config))
    torch.manual_seed(dist.get_rank())  # each rank draws its own experts; DeepSpeed makes the rest alike
    engine, *_ = ds_moe_ep.initialize(model=Model(section.moe), config=args.deepspeed_config)
    if args.resume:
        engine.load_checkpoint(args.resume)
    text, size = load_corpus().train, (engine.train_micro_batch_size_per_gpu(), TOKENS)
    share = {"rank": dist.get_rank(), "num_ranks": dist.get_world_size()}
    for step in range(engine.global_steps, args.steps):
        total = torch.zeros((), device=engine.device)
        accumulation = engine.gradient_accumulation_steps()
        for ids, targets in micro_batches(text, size, seed=0, step=step, accumulation=accumulation, **share):
            loss = engine(ids.to(engine.device), targets.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulation
        with engine.moe_ep_watch.among_others("the loss"):  # a collective of this script's own
            dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step + 1} | loss {float(total) / dist.get_world_size():.4f}", flush=True)
    if args.save:
        engine.save_checkpoint(args.save)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, help="a path, or the name of a ds_config that ships")
    parser.add_argument("--steps", type=int, default=20, help="train until this optimizer step")
    parser.add_argument("--save", metavar="DIR", help="where to save a checkpoint at the end")
    parser.add_argument("--resume", metavar="DIR", help="a folder that --save wrote")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    ds_moe_ep.init_distributed(verbose=False)
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
