"""Trains the specification's 4-layer model with expert parallelism, on text, through DeepSpeed's engine.

One file for every start: the deepspeed launcher, torchrun, mpirun. See README.md beside it for the commands.
"""

from __future__ import annotations

from ds_moe_ep.training import ending

ending.end_quietly()  # torch and deepspeed are a minute in coming where processes share cores

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_moe_ep
from ds_moe_ep.model.text import Corpus, fingerprint, micro_batches, validation_batch
from ds_moe_ep.training.checkpoints import Checkpoints
from ds_moe_ep.training.command import last_line
from ds_moe_ep.training.display import (
    Progress,
    StepReport,
    communication_hidden,
    gradient_norm,
    schedules,
    why_little_is_hidden,
    write_trace,
)
from ds_moe_ep.training.preparation import TrainingJob, prepare
from ds_moe_ep.training.world import largest, load_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; 0, or 128 + the number of the signal that ended it before its last step."""
    job = prepare(__doc__, "ds_configs/ep16_cpu.json", arguments)
    args = job.args
    model = make_model(job.section, args.seed)
    engine, *_ = ds_moe_ep.initialize(model=model, config=job.ds_config)
    load_weights(engine, args)
    checkpoints = Checkpoints(engine, args)
    stopped_by = train(engine, job, checkpoints)
    checkpoints.finish()
    if dist.get_rank() == 0 and (stopped_by or args.save):
        print(last_line(args, engine.global_steps, stopped_by), flush=True)
    if stopped_by:
        dist.destroy_process_group()
        return 128 + stopped_by
    loss = evaluate(engine, job.corpus, args.eval_batches)
    trace_note = write_trace(engine, args.trace) if args.trace else None
    if dist.get_rank() == 0:
        print(f"validation loss {loss:.3f} nats per byte, unigram entropy {job.corpus.unigram_entropy():.3f}")
        if trace_note:
            print(trace_note)
        if engine.device.type == "cpu" and (note := why_little_is_hidden(os.environ, os.cpu_count() or 1)):
            print(note)
    dist.destroy_process_group()
    return 0


def make_model(section: ds_moe_ep.Section, seed: int) -> ds_moe_ep.Transformer:
    """The model on this rank's device, with first values that every layout of experts shares."""
    grid = ds_moe_ep.RankGrid(world_size=dist.get_world_size(), ep_size=section.moe.ep_size)
    with torch.device(get_accelerator().current_device_name()):
        model = ds_moe_ep.build_transformer(section.model, section.moe, ds_moe_ep.MoE)
    ds_moe_ep.init_weights(
        model, seed, ds_moe_ep.expert_index_of(grid.ep_rank(dist.get_rank()), section.moe.num_local_experts)
    )
    return model


def train(engine: Any, job: TrainingJob, checkpoints: Checkpoints) -> signal.Signals | None:
    """Trains until step `--steps`, or until a signal, which it returns; a resumed engine goes on at its own step."""
    args, size, accumulation = job.args, batch_size(engine), engine.gradient_accumulation_steps()
    tokens_of_step = engine.train_batch_size() * size[1]
    with Progress(args.steps, args.report_every, shown=dist.get_rank() == 0) as progress, ending.Stop() as stop:
        for step in range(start_step := engine.global_steps, args.steps):
            start, sums = time.perf_counter(), torch.zeros((), device=engine.device)
            torch.manual_seed(fingerprint(args.seed, step, dist.get_rank()))  # of a router's noise
            share = {"rank": dist.get_rank(), "num_ranks": dist.get_world_size(), "accumulation": accumulation}
            for batch in micro_batches(job.corpus.train, size, seed=args.seed, step=step, **share):
                output = engine(*(ids.to(engine.device) for ids in batch))
                engine.backward(output.loss)
                engine.step()
                sums = sums + torch.cat((output.cross_entropy[None], output.exp_counts_LE.flatten()))
            with engine.moe_ep_watch.among_others(f"the figures of step {step}"):  # collectives of this script's own
                dist.all_reduce(sums)
                memory_bytes, *votes = largest([get_accelerator().max_memory_allocated(), *stop.votes()], engine.device)
            if step == start_step and dist.get_rank() == 0:
                print(*schedules(engine), sep="\n", flush=True)
            load_LE = sums[1:].view_as(output.exp_counts_LE)
            progress.show(
                StepReport(
                    step=step + 1,
                    loss=float(sums[0]) / (accumulation * dist.get_world_size()),
                    learning_rate=engine.get_lr()[0],
                    gradient_norm=gradient_norm(engine),
                    tokens_per_s=tokens_of_step / (time.perf_counter() - start),
                    memory_bytes=memory_bytes,
                    load=float((load_LE.amax(1) / load_LE.mean(1)).max()),
                    hidden=communication_hidden(engine),
                )
            )
            checkpoints.after_step()
            if (stopped_by := stop.decided(votes)) and step + 1 < args.steps:
                return stopped_by
    return None


@torch.no_grad()
def evaluate(engine: Any, corpus: Corpus, batches_of_rank: int) -> float:
    """The mean validation loss over all ranks, in nats per byte."""
    engine.eval()
    num_batches = batches_of_rank * dist.get_world_size()
    total = torch.zeros((), device=engine.device)
    for index in range(dist.get_rank(), num_batches, dist.get_world_size()):
        batch = validation_batch(corpus.validation, batch_size(engine), index=index, num_batches=num_batches)
        total += engine(*(ids.to(engine.device) for ids in batch)).cross_entropy
    with engine.moe_ep_watch.among_others("the validation loss"):
        dist.all_reduce(total)
    return float(total) / num_batches


def batch_size(engine: Any) -> tuple[int, int]:
    """Sequences and tokens of one rank's micro-batch."""
    return engine.train_micro_batch_size_per_gpu(), engine.module.config.sequence_length


if __name__ == "__main__":
    ending.run(main)
