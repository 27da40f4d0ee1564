"""Checkpoints are DeepSpeed's native ones: ours load into its layer and its into ours, optimizer states too."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.small_model import Job, batches, distance, make_engine, merged, named_weights, train_steps
from tests.ranks import RankPool

BASE = Job(ep_size=2, top_k=2)
Weights = dict[str, Tensor]


def save_then_go_on(job: Job, folder: str) -> tuple[Weights, Weights, list[float]]:
    """Two steps, a checkpoint, another step: the weights at both points and the later losses."""
    engine, steps = make_engine(job), batches(job)
    train_steps(engine, job, steps[:2])
    engine.save_checkpoint(folder, tag="two", client_state={"note": "kept"})
    saved = named_weights(engine.module, job)
    losses = [*drawn(), *train_steps(engine, job, steps[2:])]
    return saved, named_weights(engine.module, job), losses


def drawn() -> list[float]:
    """A number of each generator of this process."""
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]


def load_then_go_on(job: Job, folder: str) -> tuple[Weights, Weights, list[float]]:
    """The same from the checkpoint on, in a model that started from other weights."""
    job = replace(job, seed=job.seed + 1)
    engine, steps = make_engine(job), batches(job)
    others = drawn()
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None
    assert client_state["note"] == "kept"
    assert job.layer == "native" or "moe_ep_random_states" not in client_state
    assert engine.global_steps == 2
    loaded = named_weights(engine.module, job)
    numbers = drawn()
    assert not set(numbers) & set(others)
    losses = [*numbers, *train_steps(engine, job, steps[2:])]
    return loaded, named_weights(engine.module, job), losses


def round_trips(pairs: Sequence[tuple[Job, Job]], folder: str) -> list[list[tuple[Any, Any]]]:
    """Of each writer and reader of a checkpoint: both sides' points."""
    return [
        [save_then_go_on(writer, f"{folder}/{index}"), load_then_go_on(reader, f"{folder}/{index}")]
        for index, (writer, reader) in enumerate(pairs)
    ]


def points(results: list[Any], side: int) -> tuple[Weights, Weights, list[float]]:
    """The world's weights at the checkpoint and at the end, and the losses in between."""
    saved, last = (merged([result[side][point] for result in results]) for point in (0, 1))
    return saved, last, results[0][side][2]


JOBS = [replace(BASE, stage=stage, bf16=bf16) for stage in (0, 1, 2) for bf16 in (False, True)]


@pytest.mark.parametrize("jobs", [[*JOBS[:2], JOBS[3], JOBS[4]], pytest.param(JOBS, marks=pytest.mark.slow)])
def test_a_reloaded_run_goes_on_bit_for_bit(pool: RankPool, jobs: list[Job], tmp_path: pathlib.Path) -> None:
    by_rank = pool.run(4, round_trips, [(job, job) for job in jobs], str(tmp_path), timeout_s=240)
    for job, results in zip(jobs, zip(*by_rank, strict=True), strict=True):
        (saved, last, losses), (loaded, reloaded_last, reloaded_losses) = points(results, 0), points(results, 1)
        assert distance(loaded, saved) == 0.0, job
        assert distance(reloaded_last, last) == 0.0, job
        assert reloaded_losses == losses, f"{job}: random numbers and losses"
        assert distance(last, saved) > 1e-4, f"{job}: the step after the checkpoint changed something"


def cross_over(pairs: Sequence[tuple[Job, Job]], folder: str) -> tuple[list[list[tuple[Any, Any]]], list[Weights]]:
    """The round trips, and the readers' last weights without optimizer states."""
    trips = round_trips(pairs, folder)
    return trips, [load_weights_then_train(reader, f"{folder}/{index}") for index, (_, reader) in enumerate(pairs)]


WAYS = [
    (replace(BASE, stage=stage, layer=writer), replace(BASE, stage=stage, layer=reader))
    for stage in (0, 1, 2)
    for writer, reader in (("native", "ours"), ("ours", "native"))
]


@pytest.mark.parametrize("pairs", [[*WAYS[1:3], WAYS[4]], pytest.param(WAYS, marks=pytest.mark.slow)])
def test_checkpoints_cross_over_with_their_optimizer_states(
    pool: RankPool, pairs: list[tuple[Job, Job]], tmp_path: pathlib.Path
) -> None:
    """Bit-equal weights at the checkpoint; after another step the layers' own rounding is all that differs.

    The control: a step taken with fresh optimizer states ends elsewhere.
    """
    by_rank = pool.run(4, cross_over, pairs, str(tmp_path), timeout_s=240)
    for index, pair in enumerate(pairs):
        results = [trips[index] for trips, _ in by_rank]
        (saved, last, _), (loaded, reloaded_last, _) = points(results, 0), points(results, 1)
        assert distance(loaded, saved) == 0.0, pair
        assert distance(reloaded_last, last) <= 1e-5, pair
        assert distance(merged([fresh[index] for _, fresh in by_rank]), last) > 1e-3, pair


def load_weights_then_train(job: Job, folder: str) -> Weights:
    engine, steps = make_engine(job), batches(job)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    train_steps(engine, job, steps[2:])
    return named_weights(engine.module, job)


def write_both(folder: str) -> list[str]:
    for layer in ("ours", "native"):
        save_then_go_on(replace(BASE, layer=layer, stage=1), f"{folder}/{layer}")
    return []


def test_files_and_keys_are_those_of_deepspeeds_layer(pool: RankPool, tmp_path: pathlib.Path) -> None:
    pool.run(4, write_both, str(tmp_path), timeout_s=60)
    ours, native = (sorted((tmp_path / layer / "two").iterdir()) for layer in ("ours", "native"))
    assert [path.name for path in ours] == [path.name for path in native]
    experts = [path.name for path in ours if path.name.startswith("layer_")]
    assert len(experts) == 2 * BASE.num_experts, "one file per layer and expert"
    for mine, theirs in zip(ours, native, strict=True):
        content = torch.load(mine, weights_only=False)
        if mine.name == "mp_rank_00_model_states.pt":
            states = content.pop("moe_ep_random_states")  # travels as a client state does
            assert states["sizes"] == [4, 2] and len(states["ranks"]) == 4
        assert structure(content) == structure(torch.load(theirs, weights_only=False))


def structure(value: Any) -> Any:
    """Keys, shapes and types of a checkpoint, without its numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [structure(item) for item in value]
    return type(value).__name__


def load_elsewhere(job: Job, folder: str) -> Weights:
    engine = make_engine(replace(job, seed=job.seed + 1))
    path, _ = engine.load_checkpoint(folder, load_module_only=True)
    assert path is not None
    loaded = named_weights(engine.module, job)
    train_steps(engine, job, batches(job)[:1])
    trained = named_weights(engine.module, job)
    furthest = max(float((trained[name] - weight).abs().max()) for name, weight in loaded.items())
    assert 0 < furthest <= 0.031, "one step of Adam moves a weight by 0.03 at most: it starts from the loaded ones"
    return loaded


SIZES = [(0, (1,)), (1, (4,)), (2, (1, 4))]


def save_and_load_elsewhere(folder: str) -> list[tuple[Weights, list[Weights]]]:
    """Of each stage the weights that were saved, and those that were loaded under other ep_sizes."""
    jobs = [(replace(BASE, stage=stage), ep_sizes) for stage, ep_sizes in SIZES]
    saved = [save_then_go_on(job, f"{folder}/{job.stage}")[0] for job, _ in jobs]
    loaded = [
        [load_elsewhere(replace(job, ep_size=size), f"{folder}/{job.stage}") for size in sizes] for job, sizes in jobs
    ]
    return list(zip(saved, loaded, strict=True))


def test_weights_load_under_another_ep_size(pool: RankPool, tmp_path: pathlib.Path) -> None:
    for of_stage in zip(*pool.run(4, save_and_load_elsewhere, str(tmp_path), timeout_s=120), strict=True):
        saved = merged([weights for weights, _ in of_stage])
        for loaded in zip(*(sides for _, sides in of_stage), strict=True):
            assert distance(merged(list(loaded)), saved) == 0.0
