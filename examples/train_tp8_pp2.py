"""Trains the same model on the same text by tensor and pipeline parallelism: the baseline of train_ep16.py.

TP=8, PP=2 (the specification, section 2) on DeepSpeed's pipeline engine, or any layout of a ds_config, also with
experts shared over the ranks of each stage. See README.md beside it for the commands.
"""

from __future__ import annotations

from ds_moe_ep.training import ending

ending.end_quietly()  # torch and deepspeed are a minute in coming where processes share cores

import argparse
import signal
import time
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_moe_ep
from ds_moe_ep.model.text import Corpus, fingerprint, micro_batches, validation_batch
from ds_moe_ep.training.checkpoints import Checkpoints
from ds_moe_ep.training.command import last_line
from ds_moe_ep.training.display import Progress, StepReport, gradient_norm
from ds_moe_ep.training.preparation import TrainingJob, prepare
from ds_moe_ep.training.world import largest, load_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; 0, or 128 + the number of the signal that ended it before its last step."""
    job = prepare(__doc__, "ds_configs/tp8_pp2_cpu.json", arguments, is_pipeline=True)
    args, section = job.args, job.section
    net = ds_moe_ep.build_pipeline(section.model, section.moe, section.layout, args.seed)
    engine, *_ = deepspeed.initialize(model=net, config=job.ds_config)
    load_weights(engine, args)
    checkpoints = Checkpoints(engine, args)
    stopped_by = train(engine, job, checkpoints)
    checkpoints.save()
    if dist.get_rank() == 0 and (stopped_by or args.save):
        print(last_line(args, engine.global_steps, stopped_by), flush=True)
    if stopped_by:
        dist.destroy_process_group()
        return 128 + stopped_by
    loss = evaluate(engine, job.corpus, args, section.model.sequence_length)
    if dist.get_rank() == 0:
        print(f"validation loss {loss:.3f} nats per byte, unigram entropy {job.corpus.unigram_entropy():.3f}")
    dist.destroy_process_group()
    return 0


def train(engine: Any, job: TrainingJob, checkpoints: Checkpoints) -> signal.Signals | None:
    """Trains until step `--steps`, or until a signal, which it returns; a resumed engine goes on at its own step."""
    args, num_tokens = job.args, job.section.model.sequence_length
    size = (engine.train_micro_batch_size_per_gpu(), num_tokens)
    share = {  # of a copy of the model; together the sequences that train_ep16.py draws for a step
        "rank": engine.grid.get_data_parallel_rank(),
        "num_ranks": engine.grid.get_data_parallel_world_size(),
        "accumulation": engine.gradient_accumulation_steps(),
    }
    with Progress(args.steps, args.report_every, shown=dist.get_rank() == 0) as progress, ending.Stop() as stop:
        for step in range(engine.global_steps, args.steps):
            start = time.perf_counter()
            torch.manual_seed(fingerprint(args.seed, step, engine.grid.get_data_parallel_rank()))
            engine.train_batch(micro_batches(job.corpus.train, size, seed=args.seed, step=step, **share))
            mine = [fullest_expert(engine), get_accelerator().max_memory_allocated(), *stop.votes()]
            load, memory_bytes, *votes = largest(mine, engine.device)
            progress.show(
                StepReport(
                    step=step + 1,
                    loss=float(engine.agg_additional_losses["cross_entropy"]),
                    learning_rate=engine.get_lr()[0],
                    gradient_norm=gradient_norm(engine),
                    tokens_per_s=engine.train_batch_size() * num_tokens / (time.perf_counter() - start),
                    memory_bytes=memory_bytes,
                    load=load,
                )
            )
            checkpoints.after_step()
            if (stopped_by := stop.decided(votes)) and step + 1 < args.steps:
                return stopped_by
    return None


def fullest_expert(engine: Any) -> float:
    """Rows of the fullest expert over the mean, in the layer of this stage where that is largest. Collective."""
    counts_LE = torch.stack([block.take_counts().float() for block in engine.module.blocks])
    dist.all_reduce(counts_LE, group=engine.grid.get_data_parallel_group())
    return float((counts_LE.amax(1) / counts_LE.mean(1)).amax())


def evaluate(engine: Any, corpus: Corpus, args: argparse.Namespace, num_tokens: int) -> float:
    """The validation loss in nats per byte, over as many sequences as `--eval-batches` training steps hold."""
    of_step = engine.gradient_accumulation_steps() * engine.grid.get_data_parallel_world_size()
    num_batches = args.eval_batches * of_step
    size = (engine.train_micro_batch_size_per_gpu(), num_tokens)
    mine = range(engine.grid.get_data_parallel_rank(), num_batches, engine.grid.get_data_parallel_world_size())
    batches = [validation_batch(corpus.validation, size, index=i, num_batches=num_batches) for i in mine]
    return float(engine.eval_batch(iter(batches), num_micro_batches=len(batches)))


if __name__ == "__main__":
    ending.run(main)
