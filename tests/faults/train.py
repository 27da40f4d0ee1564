"""The job that meets faults: two MoE layers over four ranks, trained by `ds_moe_ep.initialize`, saved every two steps.

    deepspeed --num_gpus 4 tests/faults/train.py --folder FOLDER [--fault kill.dispatch@3:1] [--resume]

Batches depend on (seed, step) alone, so a resumed job continues the same curve. Each rank writes into FOLDER
`losses.RANK` (step and bits of its loss), `error.RANK` (time and text of what ended it) and `stderr.RANK`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.native_layers import PlainGelu
from tests.engine.small_model import BATCH, Job, SmallModel
from tests.faults.injection import Brittle, Fault, inject, inject_before_start
from tests.moe.layer_cases import D
from tests.moe.replica_cases import let_rows_count_alone

SAVE_EVERY = 2
CHECKPOINTS = "checkpoints"


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and raises what ended it after writing it down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--fault", type=Fault.parse, default=None)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--timeout_s", type=float, default=6.0)
    parser.add_argument("--capacity_factor", type=float, default=None)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--experts", choices=("gelu", "brittle"), default="gelu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(argv)
    rank = os.environ["RANK"]
    stderr = os.open(options.folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 2)  # of the process, so that threads and libraries write there too
    try:
        train(options)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            text = json.dumps({"time": time.time(), "type": type(error).__name__, "text": str(error)})
            (options.folder / f"error.{rank}").write_text(text)
        raise


def train(options: argparse.Namespace) -> None:
    """The training loop, with the fault in its place."""
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    torch.set_num_threads(1)
    size = dist.get_world_size()
    job = Job(world_size=size, ep_size=size, stage=1, steps=options.steps, bf16=options.precision == "bf16")
    job = replace(job, capacity_factor=options.capacity_factor, replicas=options.replicas)
    fault = options.fault
    is_mine = fault is not None and fault.rank == dist.get_rank()
    if is_mine:
        job = inject_before_start(fault, job, options.folder)
    engine = make_engine(job, options)
    if options.replicas:
        let_rows_count_alone(engine.module)
    if options.resume:
        path, _ = engine.load_checkpoint(str(options.folder / CHECKPOINTS))
        assert path is not None, "there is nothing to resume from"
    if is_mine:
        inject(fault, engine, options.folder)
    losses = os.open(options.folder / f"losses.{dist.get_rank()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    while engine.global_steps < options.steps:
        step = engine.global_steps
        x, target = batch(step, dist.get_rank())
        loss = engine(x.to(dtype), target.to(dtype))
        engine.backward(loss)
        engine.step()
        os.write(losses, f"{step} {struct.pack('>f', float(loss.detach())).hex()}\n".encode())
        if engine.global_steps % SAVE_EVERY == 0:
            engine.save_checkpoint(str(options.folder / CHECKPOINTS), tag="last")


def make_engine(job: Job, options: argparse.Namespace) -> Any:
    """The job's model in an engine. Collective."""
    import ds_moe_ep
    from ds_moe_ep.model.initialize import init_weights

    def layer() -> nn.Module:
        expert = Brittle(PlainGelu(bias=True)) if options.experts == "brittle" else PlainGelu(bias=True)
        return ds_moe_ep.MoE(D, expert, config=job.moe_config)

    model = SmallModel(layer)
    init_weights(model, job.seed, job.expert_index(dist.get_rank()))
    config = {**job.ds_config, "moe_ep": {"timeout_s": options.timeout_s}}
    return ds_moe_ep.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's inputs and targets of a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, target = torch.randn(2, BATCH, D, generator=generator)
    return x, target


if __name__ == "__main__":
    # The launcher may end survivors in the very moment of the fault, before they can tell: they end by themselves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main(sys.argv[1:])
