"""Saves in the background under the faults of `test_save`: the last good checkpoint loads bit for bit, all are told.

Disks are really full, of bytes or of names, and ranks are really killed, behind training.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import pickle
import resource
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

import ds_moe_ep
from ds_moe_ep.engine.checkpoint.background import StagedFile
from ds_moe_ep.engine.checkpoint.convert.read import SAVING
from tests.engine.checkpoint.disks import mounted
from tests.engine.checkpoint.test_save import (
    JOB,
    Action,
    die,
    keep_files_small,
    refused,
    resume,
    small_disk,  # noqa: F401 (a fixture)
    what_ranks_wrote,
)
from tests.engine.small_model import Job, batches, distance, make_engine, make_model, merged, named_weights, train_steps
from tests.load_clock import Took, without_load
from tests.ranks import RankError, run_ranks


def engine_of(job: Job) -> Any:
    """The job's engine with saves in the background. Collective."""
    config = job.ds_config | {"moe_ep": {"async_save": True}}
    return ds_moe_ep.initialize(model=make_model(job), config=config)[0]


def before_file(number: int, act: Action) -> None:
    """Lets this rank's thread do something before it writes its file of that number."""
    write, numbers = StagedFile.write, itertools.count()

    def acting(self: StagedFile) -> int:
        if next(numbers) == number:
            act(self.path)
        return write(self)

    StagedFile.write = acting  # type: ignore[method-assign]


def die_behind_training(job: Job, folder: str, rank: int, number: int) -> None:
    """A save, another step, a save of the same tag behind which one rank is killed. Survivors write what they saw."""
    engine, steps = engine_of(job), batches(job)
    train_steps(engine, job, steps[:2])
    engine.save_checkpoint(folder, tag="kept")
    ds_moe_ep.wait_for_saves(engine)
    saved = named_weights(engine.module, job)
    losses = train_steps(engine, job, steps[2:])
    pathlib.Path(folder, f"rank{dist.get_rank()}.before").write_bytes(pickle.dumps((saved, losses)))
    if dist.get_rank() == rank:
        before_file(number, die)
    engine.save_checkpoint(folder, tag="kept")
    error, took = refused(lambda: ds_moe_ep.wait_for_saves(engine))
    pathlib.Path(folder, f"rank{dist.get_rank()}.after").write_bytes(pickle.dumps((error, took)))
    raise RuntimeError("the job ends, as after any error that nobody catches")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank", "number"), [(0, 3, 1), (1, 0, 2), (1, 3, 3), (2, 1, 0)])
def test_a_kill_behind_training_leaves_the_last_checkpoint_from_which_the_job_goes_on_bit_for_bit(
    stage: int, rank: int, number: int, tmp_path: pathlib.Path
) -> None:
    """Rank 0, which publishes, among them. Survivors tell within 10 s that a rank did not answer."""
    job = replace(JOB, stage=stage)
    with pytest.raises(RankError, match=f"rank {rank}: Died: exit code -9"):
        run_ranks(4, die_behind_training, job, str(tmp_path), rank, number, timeout_s=60)
    after = what_ranks_wrote(tmp_path, "after")
    assert len(after) == 3
    assert without_load(took for _, took in after) < 10
    for error, _ in after:
        assert error.startswith(f"EngineError: {tmp_path}/kept: not saved, a rank ended or stalled meanwhile"), error
        assert "'latest' still names kept" in error
    before = what_ranks_wrote(tmp_path, "before")
    results = run_ranks(4, resume, job, str(tmp_path), timeout_s=60)
    assert distance(merged([loaded for loaded, _ in results]), merged([saved for saved, _ in before])) == 0.0
    assert results[0][1] == before[0][1]


def save_behind_on_a_full_disk(job: Job, folder: str, rank: int, number: int) -> tuple[Any, ...]:
    """Two steps, a save, a step, a save of the same tag that fails on one rank; what is left; a save that succeeds."""
    engine, steps = engine_of(job), batches(job)
    train_steps(engine, job, steps[:2])
    engine.save_checkpoint(folder, tag="kept")
    ds_moe_ep.wait_for_saves(engine)
    saved = named_weights(engine.module, job)
    write = StagedFile.write
    train_steps(engine, job, steps[2:3])
    if dist.get_rank() == rank:
        before_file(number, keep_files_small)
    engine.save_checkpoint(folder, tag="kept")
    error, took = refused(lambda: ds_moe_ep.wait_for_saves(engine))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    StagedFile.write = write  # type: ignore[method-assign]
    dist.barrier()
    left = sorted(os.listdir(folder))
    other = make_engine(replace(job, seed=9))
    other.load_checkpoint(folder)
    loaded = named_weights(other.module, job)
    engine.save_checkpoint(folder, tag="kept")
    ds_moe_ep.wait_for_saves(engine)
    other.load_checkpoint(folder)
    again = distance(named_weights(other.module, job), named_weights(engine.module, job))
    return error, took, left, distance(loaded, saved), again, distance(loaded, named_weights(engine.module, job))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank", "number"), [(0, 2, 1), (1, 0, 2), (2, 3, 4)])
def test_a_full_disk_of_one_rank_behind_training_is_told_by_all_and_the_last_checkpoint_of_the_tag_stays(
    stage: int, rank: int, number: int, tmp_path: pathlib.Path
) -> None:
    job = replace(JOB, stage=stage)
    results = run_ranks(4, save_behind_on_a_full_disk, job, str(tmp_path), rank, number, timeout_s=60)
    assert without_load(took for _, took, *_ in results) < 5
    for error, _, left, kept, again, trained in results:
        assert error.startswith(f"EngineError: {tmp_path}/kept: not saved, rank {rank} failed: {tmp_path}/kept{SAVING}")
        assert "_states.pt: File too large" in error and "'latest' still names kept" in error
        assert [name for name in left if name.startswith("kept")] == ["kept"]
        assert (kept, again) == (0.0, 0.0)
        assert trained > 1e-4, "the steps between the saves changed something"


def fill_the_disk_behind(folder: str) -> list[str]:
    """A save that meets a full disk, one that fits, one that is refused before it writes, by error."""
    engine = engine_of(JOB)
    train_steps(engine, JOB, batches(JOB)[:1])
    ballast = pathlib.Path(folder, "ballast")
    if dist.get_rank() == 0:
        ballast.write_bytes(bytes(500_000))
    dist.barrier()
    told = []

    def save(tag: str) -> None:
        engine.save_checkpoint(folder, tag=tag)
        ds_moe_ep.wait_for_saves(engine)

    for tag in ("first", "first", "second"):
        told.append(refused(partial(save, tag))[0])
        if dist.get_rank() == 0:
            ballast.unlink(missing_ok=True)
        dist.barrier()
    return [*told, *sorted(os.listdir(folder))]


@pytest.mark.slow
def test_a_disk_that_runs_full_behind_training_gives_its_space_back_and_one_without_room_is_refused_first(
    small_disk: pathlib.Path,  # noqa: F811
) -> None:
    for full, fits, too_much, *left in run_ranks(4, fill_the_disk_behind, str(small_disk), timeout_s=60):
        assert f"{small_disk}/first: not saved, rank" in full
        assert f"{small_disk}/first{SAVING}/" in full and "No space left on device" in full
        assert "there is no earlier one" in full
        assert fits == ""
        assert "bytes free there, and its 4 ranks wrote" in too_much
        assert "'latest' still names first" in too_much
        assert left == ["first", "latest", "zero_to_fp32.py", "zero_to_torch.py"]


@pytest.fixture
def few_names(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A filesystem of 16 files: a checkpoint of the tests' model has more."""
    with mounted(tmp_path / "disk", "nr_inodes=16") as disk:
        yield disk


def run_out_of_names(folder: str) -> tuple[str, Took, list[str]]:
    engine = engine_of(JOB)
    train_steps(engine, JOB, batches(JOB)[:1])
    engine.save_checkpoint(folder, tag="first")
    error, took = refused(lambda: ds_moe_ep.wait_for_saves(engine))
    return error, took, sorted(os.listdir(folder))


@pytest.mark.slow
def test_a_disk_without_a_name_for_another_file_is_told_by_all(few_names: pathlib.Path) -> None:
    """Not a mark of what failed could be written there at first."""
    results = run_ranks(4, run_out_of_names, str(few_names), timeout_s=60)
    assert without_load(took for _, took, _ in results) < 10
    for error, _, left in results:
        assert error.startswith(f"EngineError: {few_names}/first: not saved, rank")
        assert "No space left on device" in error
        assert [name for name in left if not name.endswith(".py")] == []
