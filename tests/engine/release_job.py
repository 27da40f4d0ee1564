"""Trains on the DeepSpeed of the interpreter that runs it: `python -m tests.engine.release_job FILE FOLDER`.

FILE gets what came of it, by the name of the run; FOLDER keeps a checkpoint for each layer.
"""

from __future__ import annotations

import pathlib
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.errors import EngineError
from tests.engine.hooks.hooked_layers import KNOBS, hooked
from tests.engine.small_model import Job, batches, make_engine, merged, named_weights, train_steps
from tests.ranks import run_ranks

RESUMED = Job(world_size=2, ep_size=2, stage=1, steps=4)
ACCUMULATING = "ours on 4 ranks, ZeRO 2, accumulating"
JOBS: dict[str, Job] = {
    "ours on 2 ranks": Job(world_size=2, ep_size=2),
    "ours on 2 ranks under deepspeed.initialize": Job(world_size=2, ep_size=2, door="deepspeed"),
    "hooked on 2 ranks": Job(world_size=2, ep_size=2, layer="native"),
    "ours on 4 ranks, ZeRO 1, clipped": Job(stage=1, ep_size=2, clipping=0.05),
    ACCUMULATING: Job(stage=2, accumulation=2),
    "ours on 4 ranks, ZeRO 2": Job(stage=2, capacity_factor=1.0),
    "ours on 4 ranks under deepspeed.initialize": Job(stage=1, ep_size=2, door="deepspeed"),
    "hooked on 4 ranks, ZeRO 1": Job(stage=1, ep_size=2, layer="native", capacity_factor=1.0),
    "hooked on 4 ranks, ZeRO 2, clipped": Job(stage=2, ep_size=4, layer="native", clipping=0.05),
}
Result = tuple[list[float], dict[str, Tensor]]


def overlapped(engine: Any, job: Job) -> AbstractContextManager[Any]:
    """The scope in which DeepSpeed's own layer is hooked."""
    return hooked(engine, **KNOBS[0]) if job.layer == "native" else nullcontext()


def train(job: Job) -> Result | str:
    """Losses and this rank's last weights, or why the release cannot train so."""
    try:
        engine = make_engine(job)
        with overlapped(engine, job):
            losses = train_steps(engine, job, batches(job))
    except EngineError as error:
        return str(error)
    return losses, named_weights(engine.module, job)


def save_half_way(job: Job, folder: str) -> None:
    """Two steps, and a checkpoint."""
    engine = make_engine(job)
    with overlapped(engine, job):
        train_steps(engine, job, batches(job)[:2])
        assert engine.save_checkpoint(folder)


def go_on(job: Job, folder: str) -> Result:
    """The checkpoint in a fresh engine, and the two steps that are left."""
    engine = make_engine(replace(job, seed=9))
    with overlapped(engine, job):
        assert engine.load_checkpoint(folder)[0] is not None
        losses = train_steps(engine, job, batches(job)[2:])
    return losses, named_weights(engine.module, job)


def without_zero(folder: str) -> str:
    """Error of loading a checkpoint that was saved without ZeRO, or an empty string; its weights load in any case."""
    job = replace(RESUMED, stage=0)
    save_half_way(job, folder)
    engine = make_engine(job)
    assert engine.load_checkpoint(folder, load_module_only=True)[0] is not None
    try:
        engine.load_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def work(world_size: int, folder: str) -> dict[str, Any]:
    """All that is run in a world of this size, on this rank."""
    found: dict[str, Any] = {name: train(job) for name, job in JOBS.items() if job.world_size == world_size}
    if world_size == RESUMED.world_size:
        for layer in ("ours", "native"):
            job = replace(RESUMED, layer=layer)
            save_half_way(job, f"{folder}/{layer}")
            found[f"resumed, {layer}"] = go_on(job, f"{folder}/{layer}")
        found["without ZeRO"] = without_zero(f"{folder}/without")
    return found


def whole(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a world with all ranks' weights together."""
    found: dict[str, Any] = {}
    for name, first in by_rank[0].items():
        is_run = isinstance(first, tuple)
        found[name] = (first[0], merged([each[name][1] for each in by_rank])) if is_run else first
    return found


if __name__ == "__main__":
    import deepspeed

    path, folder = sys.argv[1:]
    results = {"release": deepspeed.__version__, "torch": str(torch.__version__)}
    for size in (2, 4):
        results |= whole(run_ranks(size, work, size, folder, timeout_s=300))
    torch.save(results, pathlib.Path(path))
