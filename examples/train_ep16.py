"""Trains the specification's 4-layer model with expert parallelism, on text, through DeepSpeed's engine.

One file for every start: the deepspeed launcher, torchrun, mpirun. See README.md beside it for the commands.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from command import parse_arguments, read_corpus, read_settings, resume_command
from deepspeed.accelerator import get_accelerator
from display import Progress, StepReport, communication_hidden, schedules, write_trace
from world import set_up_process, start_from

import ds_moe_ep
from ds_moe_ep.text import Corpus, training_batch, validation_batch
from ds_moe_ep.training import read_training


def main() -> None:
    args = parse_arguments(__doc__)
    set_up_process()
    ds_config, section = read_settings(args)
    read_training(ds_config, section.moe.ep_size, dist.get_world_size())  # refuses a world of another size
    corpus = read_corpus(args)
    model = make_model(section, args.seed)
    engine, *_ = ds_moe_ep.initialize(model=model, config=ds_config)
    start_from(engine, args)
    train(engine, corpus, args)
    loss = evaluate(engine, corpus, args.eval_batches)
    if args.save:
        engine.save_checkpoint(args.save)
    trace_note = write_trace(engine, args.trace) if args.trace else None
    if dist.get_rank() == 0:
        print(f"validation loss {loss:.3f} nats a byte, unigram entropy {corpus.unigram_entropy():.3f}")
        if trace_note:
            print(trace_note)
        if args.save:
            print(f"checkpoint in {args.save}; to resume:\n  {resume_command(args.save, 2 * args.steps)}")
    dist.destroy_process_group()


def make_model(section: ds_moe_ep.Section, seed: int) -> ds_moe_ep.Transformer:
    """The model on this rank's device, with first values that every layout of experts shares."""
    grid = ds_moe_ep.RankGrid(world_size=dist.get_world_size(), ep_size=section.moe.ep_size)
    with torch.device(get_accelerator().current_device_name()):
        model = ds_moe_ep.build_transformer(section.model, section.moe, ds_moe_ep.MoE)
    ds_moe_ep.init_weights(
        model, seed, ds_moe_ep.expert_index_of(grid.ep_rank(dist.get_rank()), section.moe.num_local_experts)
    )
    return model


def train(engine: Any, corpus: Corpus, args: argparse.Namespace) -> None:
    """Trains until step `args.steps`; a resumed engine goes on at its own step."""
    size, accumulation = batch_size(engine), engine.gradient_accumulation_steps()
    tokens_of_step = engine.train_batch_size() * size[1]
    with Progress(args.steps, args.report_every, shown=dist.get_rank() == 0) as progress:
        for step in range(start_step := engine.global_steps, args.steps):
            start, sums = time.perf_counter(), torch.zeros((), device=engine.device)
            for micro_step in range(accumulation):
                place = micro_step * dist.get_world_size() + dist.get_rank()
                share = {"first": place * size[0], "num_sequences": engine.train_batch_size()}
                batch = training_batch(corpus.train, size, seed=args.seed, step=step, **share)
                output = engine(*(ids.to(engine.device) for ids in batch))
                engine.backward(output.loss)
                engine.step()
                sums = sums + torch.cat((output.cross_entropy[None], output.exp_counts_LE.flatten()))
            dist.all_reduce(sums)
            loss = float(sums[0]) / (accumulation * dist.get_world_size())
            load_LE = sums[1:].view_as(output.exp_counts_LE)
            load = float((load_LE.amax(1) / load_LE.mean(1)).max())
            tokens_per_s = tokens_of_step / (time.perf_counter() - start)
            if step == start_step and dist.get_rank() == 0:
                print(*schedules(engine), sep="\n", flush=True)
            progress.show(StepReport(step + 1, loss, tokens_per_s, load, *communication_hidden(engine)))


@torch.no_grad()
def evaluate(engine: Any, corpus: Corpus, batches_of_rank: int) -> float:
    """The mean validation loss over all ranks, in nats a byte."""
    engine.eval()
    num_batches = batches_of_rank * dist.get_world_size()
    total = torch.zeros((), device=engine.device)
    for index in range(dist.get_rank(), num_batches, dist.get_world_size()):
        batch = validation_batch(corpus.validation, batch_size(engine), index=index, num_batches=num_batches)
        total += engine(*(ids.to(engine.device) for ids in batch)).cross_entropy
    dist.all_reduce(total)
    return float(total) / num_batches


def batch_size(engine: Any) -> tuple[int, int]:
    """Sequences and tokens of one rank's micro-batch."""
    return engine.train_micro_batch_size_per_gpu(), engine.module.config.sequence_length


if __name__ == "__main__":
    main()
