"""Trains the same model on the same text by tensor and pipeline parallelism: the baseline of train_ep16.py.

TP=8, PP=2 (the specification, section 2) on DeepSpeed's pipeline engine. See README.md beside it for the commands.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from command import parse_arguments, read_corpus, read_settings, resume_command
from display import Progress, StepReport
from world import set_up_process, start_from

import ds_moe_ep
from ds_moe_ep.text import Batch, Corpus, training_batch, validation_batch


def main() -> None:
    args = parse_arguments(__doc__, config="ds_configs/tp8_pp2_cpu.json")
    if args.trace:
        raise SystemExit("--trace: records the experts' traffic, of which a pipeline has none; leave it out")
    set_up_process()
    ds_config, section = read_settings(args)
    corpus = read_corpus(args)
    net = ds_moe_ep.build_pipeline(section.model, section.moe, section.layout, args.seed)
    engine, *_ = deepspeed.initialize(model=net, config=ds_config)
    start_from(engine, args)
    train(engine, corpus, args, section.model.sequence_length)
    loss = evaluate(engine, corpus, args, section.model.sequence_length)
    if args.save:
        engine.save_checkpoint(args.save)
    if dist.get_rank() == 0:
        print(f"validation loss {loss:.3f} nats a byte, unigram entropy {corpus.unigram_entropy():.3f}")
        if args.save:
            print(f"checkpoint in {args.save}; to resume:\n  {resume_command(args.save, 2 * args.steps)}")
    dist.destroy_process_group()


def train(engine: Any, corpus: Corpus, args: argparse.Namespace, num_tokens: int) -> None:
    """Trains until step `args.steps` on sequences of `num_tokens`; a resumed engine goes on at its own step."""
    with Progress(args.steps, args.report_every, shown=dist.get_rank() == 0) as progress:
        for step in range(engine.global_steps, args.steps):
            start = time.perf_counter()
            engine.train_batch(micro_batches(engine, corpus, args.seed, step, num_tokens))
            loss = float(engine.agg_additional_losses["cross_entropy"])
            load = fullest_expert(engine)
            tokens_per_s = engine.train_batch_size() * num_tokens / (time.perf_counter() - start)
            progress.show(StepReport(step + 1, loss, tokens_per_s, load, None, None))


def micro_batches(engine: Any, corpus: Corpus, seed: int, step: int, num_tokens: int) -> Iterator[Batch]:
    """This copy's micro-batches of a step: together the sequences that train_ep16.py draws for it."""
    size = (engine.train_micro_batch_size_per_gpu(), num_tokens)
    for micro_step in range(engine.gradient_accumulation_steps()):
        place = micro_step * engine.grid.get_data_parallel_world_size() + engine.grid.get_data_parallel_rank()
        share = {"first": place * size[0], "num_sequences": engine.train_batch_size()}
        yield training_batch(corpus.train, size, seed=seed, step=step, **share)


def fullest_expert(engine: Any) -> float:
    """Rows of the fullest expert over the mean, in the layer where that is largest. Collective."""
    counts = [block.take_counts().float() for block in engine.module.blocks]
    load = torch.stack([counts_E.amax() / counts_E.mean() for counts_E in counts]).amax()
    dist.all_reduce(load, op=dist.ReduceOp.MAX)
    return float(load)


def evaluate(engine: Any, corpus: Corpus, args: argparse.Namespace, num_tokens: int) -> float:
    """The validation loss in nats a byte, over as many sequences as `--eval-batches` training steps hold."""
    of_step = engine.gradient_accumulation_steps() * engine.grid.get_data_parallel_world_size()
    num_batches = args.eval_batches * of_step
    size = (engine.train_micro_batch_size_per_gpu(), num_tokens)
    mine = range(engine.grid.get_data_parallel_rank(), num_batches, engine.grid.get_data_parallel_world_size())
    batches = [validation_batch(corpus.validation, size, index=i, num_batches=num_batches) for i in mine]
    return float(engine.eval_batch(iter(batches), num_micro_batches=len(batches)))


if __name__ == "__main__":
    main()
