"""Saves in the background hold what the step held, and what safe saves promise: complete or not there, told by all."""

from __future__ import annotations

import os
import pathlib
import pickle
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import ds_moe_ep
from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.engine.checkpoint import background
from ds_moe_ep.engine.checkpoint.background import StagedFile, refuse_background
from ds_moe_ep.errors import ConfigError
from tests.engine.checkpoint.test_save import JOB, keep_files_small, refused, resume, what_ranks_wrote
from tests.engine.small_model import batches, distance, make_engine, make_model, merged, named_weights, train_steps
from tests.load_clock import Stopwatch, without_load
from tests.ranks import RankError, RankPool, run_ranks


def engine_of() -> Any:
    """The job's engine with saves in the background. Collective."""
    config = JOB.ds_config | {"moe_ep": {"async_save": True}}
    return ds_moe_ep.initialize(model=make_model(JOB), config=config)[0]


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """A scope in which no file is written until the event is set."""
    write, event = StagedFile.write, threading.Event()

    def hold(self: StagedFile) -> int:
        event.wait(30)
        return write(self)

    StagedFile.write = hold  # type: ignore[method-assign]
    try:
        yield event
    finally:
        event.set()
        StagedFile.write = write  # type: ignore[method-assign]


def save_and_go_on(folder: str) -> tuple[Any, ...]:
    """Two steps, a save that is held back, another step; then the save's end, and what it holds."""
    engine, steps = engine_of(), batches(JOB)
    train_steps(engine, JOB, steps[:2])
    saved = named_weights(engine.module, JOB)
    with held_back() as event:
        engine.save_checkpoint(folder, tag="two")
        losses = train_steps(engine, JOB, steps[2:])
        early = sorted(os.listdir(folder))
        dist.barrier()
        event.set()
        ds_moe_ep.wait_for_saves(engine)
    files = sorted(os.listdir(f"{folder}/two"))
    plain = make_engine(JOB)
    train_steps(plain, JOB, steps[:2])
    plain.save_checkpoint(f"{folder}/plain", tag="two")
    as_plain = files == sorted(os.listdir(f"{folder}/plain/two"))
    engine.save_checkpoint(folder, tag="three")
    engine.load_checkpoint(folder, tag="three")  # waits for it
    moved = distance(named_weights(engine.module, JOB), saved)
    return early, as_plain, moved, saved, losses


def test_a_save_holds_the_weights_and_moments_of_its_step_while_training_goes_on(
    pool: RankPool, tmp_path: pathlib.Path
) -> None:
    results = pool.run(4, save_two_and_resume, str(tmp_path), timeout_s=100)
    early, as_plain, moved, saved, losses, loaded, again = zip(*results, strict=True)
    for names in early:
        assert "two" not in names and "two.saving" in names and "latest" not in names, "nothing was written yet"
    assert all(as_plain), "the files of a save that waits"
    assert min(moved) > 1e-4, "the steps behind the save changed something"
    assert distance(merged(list(loaded)), merged(list(saved))) == 0.0
    assert again[0] == losses[0], "moments too"


def save_two_and_resume(folder: str) -> tuple[Any, ...]:
    found = save_and_go_on(folder)
    if dist.get_rank() == 0:
        pathlib.Path(folder, "latest").write_text("two")
    dist.barrier()
    return *found, *resume(JOB, folder)


def fail_and_recover(folder: str) -> tuple[Any, ...]:
    """A good save, one that fails on rank 2 behind training, and one that has room again."""
    engine, steps = engine_of(), batches(JOB)
    train_steps(engine, JOB, steps[:2])
    engine.save_checkpoint(folder, tag="kept")
    ds_moe_ep.wait_for_saves(engine)
    if dist.get_rank() == 2:
        keep_files_small("")
    engine.save_checkpoint(folder, tag="kept")
    train_steps(engine, JOB, steps[2:3])
    error, took = refused(lambda: engine.save_checkpoint(folder, tag="next"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    left = sorted(os.listdir(folder))
    engine.save_checkpoint(folder, tag="next")
    dist.destroy_process_group()  # a script ends: its save does not need the groups
    for thread in threading.enumerate():
        if thread.name == "ds_moe_ep save":
            assert not thread.daemon
            thread.join(30)  # as Python does before a process ends; ranks of tests end at once
    return error, took, left


def test_a_full_disk_behind_training_is_told_by_all_at_the_next_save_and_a_script_that_ends_has_saved(
    pool: RankPool,
    tmp_path: pathlib.Path,
) -> None:
    results = run_ranks(4, fail_and_recover, str(tmp_path), timeout_s=60)
    assert without_load(took for _, took, _ in results) < 5
    for error, _, left in results:
        assert error.startswith(f"EngineError: {tmp_path}/kept: not saved, ")
        assert f"rank 2 failed: {tmp_path}/kept.saving/" in error and "File too large" in error
        assert "'latest' still names kept" in error
        assert [name for name in left if not name.endswith(".py")] == ["kept", "latest"]
    assert (tmp_path / "latest").read_text() == "next"
    assert not list(tmp_path.rglob("*.written"))
    assert pool.run(4, resume, JOB, str(tmp_path), timeout_s=60)


def die_behind_training(folder: str) -> None:
    engine, steps = engine_of(), batches(JOB)
    train_steps(engine, JOB, steps[:2])
    engine.save_checkpoint(folder, tag="kept")
    ds_moe_ep.wait_for_saves(engine)
    saved, rank = named_weights(engine.module, JOB), dist.get_rank()
    pathlib.Path(folder, f"rank{rank}.before").write_bytes(pickle.dumps(saved))
    if rank == 3:
        StagedFile.write = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign,return-value]
    engine.save_checkpoint(folder, tag="kept")
    watch = Stopwatch()
    going_on = next(each for each in engine.moe_ep_extensions.callbacks if hasattr(each, "_going_on"))._going_on
    problem = going_on.wait() if rank == 0 else ""
    pathlib.Path(folder, f"rank{rank}.after").write_bytes(pickle.dumps((problem, watch.read())))
    raise RuntimeError("the job ends")


def test_a_rank_that_is_killed_behind_training_leaves_the_last_checkpoint(
    pool: RankPool, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(RankError, match="rank 3: Died: exit code -9"):
        pool.run(4, die_behind_training, str(tmp_path), timeout_s=60)
    (problem, took), *_ = what_ranks_wrote(tmp_path, "after")
    assert "of 4 ranks did not write their files" in problem
    assert without_load([took]) < 10
    assert (tmp_path / "kept.saving").is_dir(), "what was half written"
    saved = merged(what_ranks_wrote(tmp_path, "before"))
    loaded = pool.run(4, resume, JOB, str(tmp_path), timeout_s=60)
    assert distance(merged([weights for weights, _ in loaded]), saved) == 0.0


def test_engines_whose_files_cannot_be_made_in_memory_are_refused_by_name() -> None:
    class FastCheckpointEngine:
        pass

    class TorchCheckpointEngine:
        pass

    def refusal(checkpoint_engine: Any, local: bool = False, nvme: bool = False) -> str:
        engine = SimpleNamespace(
            checkpoint_engine=checkpoint_engine,
            use_node_local_storage=lambda: local,
            zero_nvme_offload_optimizer=lambda: nvme,
        )
        with pytest.raises(ConfigError) as error:
            refuse_background(engine)
        return str(error.value)

    assert "FastCheckpointEngine writes its files in a way of its own" in refusal(FastCheckpointEngine())
    assert "checkpoint.use_node_local_storage" in refusal(TorchCheckpointEngine(), local=True)
    assert "NVMe" in refusal(TorchCheckpointEngine(), nvme=True)
    with pytest.raises(ConfigError, match="DeepSpeed saves pipelines"):
        Layout(pp_size=2).check(ModelConfig(), MoEConfig(async_save=True))
    assert background.PATIENCE_S >= 600
