"""Saves that fail or are killed: the last good checkpoint loads bit for bit, and every rank says who failed and why.

Disks are really full (a limit on the size of one rank's files; a small tmpfs where the test may mount one) and ranks
are really killed. The control: the same kill in DeepSpeed's own save damages the checkpoint of that tag.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.read import SAVING
from tests.engine.checkpoint.disks import mounted
from tests.engine.small_model import Job, batches, distance, make_engine, merged, named_weights, train_steps
from tests.load_clock import Stopwatch, Took, without_load
from tests.ranks import RankError, RankPool

JOB = Job(ep_size=4, stage=1)
PLAIN = replace(JOB, door="deepspeed")
Weights = dict[str, Tensor]
Action = Callable[[str], None]


def before_file(engine: Any, number: int, act: Action) -> None:
    """Lets this rank do something before it writes its file of that number."""
    write, paths = engine.checkpoint_engine.save, []

    def save(state_dict: Any, path: str) -> Any:
        paths.append(path)
        if len(paths) == number + 1:
            act(path)
        return write(state_dict, path)

    engine.checkpoint_engine.save = save


def keep_files_small(path: str) -> None:
    """From here on no file of this process grows beyond 512 bytes: the write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))


def die(path: str) -> None:
    pathlib.Path(path).write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)


def refused(action: Callable[[], Any]) -> tuple[str, Took]:
    """The error that an action ends with, and its seconds."""
    watch = Stopwatch()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}", watch.read()
    return "", watch.read()


def save_on_a_full_disk(job: Job, folder: str, rank: int, number: int) -> tuple[Any, ...]:
    """Two steps, a save, a step, a save of the same tag that fails on one rank; what is left; a save that succeeds."""
    engine, steps = make_engine(job), batches(job)
    train_steps(engine, job, steps[:2])
    engine.save_checkpoint(folder, tag="kept")
    saved = named_weights(engine.module, job)
    train_steps(engine, job, steps[2:3])
    if dist.get_rank() == rank:
        before_file(engine, number, keep_files_small)
    error, took = refused(lambda: engine.save_checkpoint(folder, tag="kept"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    left = sorted(os.listdir(folder))
    other = make_engine(replace(job, seed=9))
    other.load_checkpoint(folder)
    loaded = named_weights(other.module, job)
    engine.save_checkpoint(folder, tag="kept")
    other.load_checkpoint(folder)
    again = distance(named_weights(other.module, job), named_weights(engine.module, job))
    return error, took, left, distance(loaded, saved), again, distance(loaded, named_weights(engine.module, job))


@pytest.mark.parametrize(
    ("stage", "rank", "number"),
    [(0, 2, 1), (1, 3, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0, 2), (2, 1, 0)))],
)
def test_a_full_disk_on_one_rank_is_told_by_all_and_the_last_checkpoint_of_the_tag_stays(
    pool: RankPool, stage: int, rank: int, number: int, tmp_path: pathlib.Path
) -> None:
    """Within 5 s on tiny files; the next save, with room again, succeeds."""
    results = pool.run(4, save_on_a_full_disk, replace(JOB, stage=stage), str(tmp_path), rank, number, timeout_s=60)
    assert without_load(took for _, took, *_ in results) < 5
    for error, _, left, kept, again, trained in results:
        assert error.startswith(f"EngineError: {tmp_path}/kept: not saved, rank {rank} failed: {tmp_path}/kept{SAVING}")
        assert "_states.pt: File too large (RuntimeError: " in error
        assert "'latest' still names kept" in error
        assert [name for name in left if name.startswith("kept")] == ["kept"]
        assert (kept, again) == (0.0, 0.0)
        assert trained > 1e-4, "the steps between the saves changed something"


def save_twice_then_die(job: Job, folder: str, rank: int, number: int) -> None:
    """A save, another step, and a save of the same tag in which one rank is killed. Survivors write what they saw."""
    engine, steps = make_engine(job), batches(job)
    train_steps(engine, job, steps[:2])
    engine.save_checkpoint(folder, tag="kept")
    saved = named_weights(engine.module, job)
    losses = train_steps(engine, job, steps[2:])
    pathlib.Path(folder, f"rank{dist.get_rank()}.before").write_bytes(pickle.dumps((saved, losses)))
    if dist.get_rank() == rank:
        before_file(engine, number, die)
    error, took = refused(lambda: engine.save_checkpoint(folder, tag="kept"))
    pathlib.Path(folder, f"rank{dist.get_rank()}.after").write_bytes(pickle.dumps((error, took)))
    raise RuntimeError("the job ends, as after any error that nobody catches")


def resume(job: Job, folder: str) -> tuple[Weights, list[float]]:
    """The weights of the checkpoint and the losses from there on."""
    engine = make_engine(replace(job, seed=9))
    assert engine.load_checkpoint(folder)[0] is not None
    return named_weights(engine.module, job), train_steps(engine, job, batches(job)[2:])


def what_ranks_wrote(folder: pathlib.Path, when: str) -> list[Any]:
    return [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"rank*.{when}"))]


@pytest.mark.parametrize(("rank", "number"), [(0, 2), (3, 3)])
def test_a_kill_in_mid_save_leaves_the_last_checkpoint_from_which_the_job_goes_on_bit_for_bit(
    pool: RankPool, rank: int, number: int, tmp_path: pathlib.Path
) -> None:
    """Survivors tell within 5 s that a rank did not answer."""
    with pytest.raises(RankError, match=f"rank {rank}: Died: exit code -9"):
        pool.run(4, save_twice_then_die, JOB, str(tmp_path), rank, number, timeout_s=60)
    after = what_ranks_wrote(tmp_path, "after")
    assert len(after) == 3
    assert without_load(took for _, took in after) < 5
    for error, _ in after:
        assert error.startswith(f"EngineError: {tmp_path}/kept: not saved, a rank ended or stalled meanwhile")
    assert (tmp_path / f"kept{SAVING}").is_dir(), "what was half written"
    before = what_ranks_wrote(tmp_path, "before")
    results = pool.run(4, resume, JOB, str(tmp_path), timeout_s=60)
    assert distance(merged([loaded for loaded, _ in results]), merged([saved for saved, _ in before])) == 0.0
    assert results[0][1] == before[0][1]


def test_the_same_kill_in_deepspeeds_own_save_leaves_nothing_that_loads(pool: RankPool, tmp_path: pathlib.Path) -> None:
    """The control of the tests above: rank 3's file is torn, and the other ranks load a mixture of two steps."""
    with pytest.raises(RankError, match="rank 3: Died"):
        pool.run(4, save_twice_then_die, PLAIN, str(tmp_path), 3, 3, timeout_s=60)
    assert (tmp_path / "latest").read_text() == "kept"
    with pytest.raises(RankError, match="rank 3: "):
        pool.run(4, resume, PLAIN, str(tmp_path), timeout_s=30)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A filesystem of 640 KiB, where one checkpoint of the tests' model fits and a second does not."""
    with mounted(tmp_path / "disk", "size=640k") as disk:
        yield disk


def fill_the_disk(folder: str) -> list[str]:
    """A save that meets a full disk, one that fits, one that is refused before it writes, by error."""
    engine = make_engine(JOB)
    train_steps(engine, JOB, batches(JOB)[:1])
    ballast = pathlib.Path(folder, "ballast")
    if dist.get_rank() == 0:
        ballast.write_bytes(bytes(500_000))
    dist.barrier()
    full, _ = refused(lambda: engine.save_checkpoint(folder, tag="first"))
    if dist.get_rank() == 0:
        ballast.unlink()
    dist.barrier()
    fits, _ = refused(lambda: engine.save_checkpoint(folder, tag="first"))
    before_file(engine, 0, lambda path: os._exit(3))
    too_much, _ = refused(lambda: engine.save_checkpoint(folder, tag="second"))
    return [full, fits, too_much, *sorted(os.listdir(folder))]


def test_a_disk_that_runs_full_gives_its_space_back_and_one_without_room_is_refused_first(
    pool: RankPool,
    small_disk: pathlib.Path,
) -> None:
    for full, fits, too_much, *left in pool.run(4, fill_the_disk, str(small_disk), timeout_s=60):
        assert f"{small_disk}/first: not saved, rank" in full
        assert f"{small_disk}/first{SAVING}/" in full
        assert "No space left on device (RuntimeError: " in full
        assert "there is no earlier one" in full
        assert fits == ""
        assert "bytes free there, and its 4 ranks wrote" in too_much
        assert "'latest' still names first" in too_much
        assert left == ["first", "latest", "zero_to_fp32.py", "zero_to_torch.py"]


def ask_for_odd_saves(folder: str) -> tuple[list[str], list[str]]:
    """Errors of a save with another tag on one rank and with a client state that one rank alone refuses; then the
    files of saves with DeepSpeed's other arguments."""
    engine, rank = make_engine(JOB), dist.get_rank()
    train_steps(engine, JOB, batches(JOB)[:1])
    errors = [
        refused(lambda: engine.save_checkpoint(folder, tag="odd" if rank == 2 else "even"))[0],
        refused(lambda: engine.save_checkpoint(folder, tag="one", client_state={"autoep_layers": 1}))[0],
        refused(lambda: engine.save_checkpoint(""))[0],
    ]
    assert engine.save_checkpoint(folder, client_state={"note": "kept"}, exclude_frozen_parameters=True)
    assert engine.save_checkpoint(folder, "aside/two", {}, False)
    assert engine.load_checkpoint(folder)[1]["note"] == "kept"
    assert engine.load_checkpoint(folder, "aside/two")[0] is not None
    return errors, sorted(os.listdir(folder))


def test_ranks_that_disagree_or_fail_alone_all_raise_and_deepspeeds_arguments_keep_their_meaning(
    pool: RankPool,
    tmp_path: pathlib.Path,
) -> None:
    for errors, names in pool.run(4, ask_for_odd_saves, str(tmp_path), timeout_s=60):
        odd, reserved, nowhere = errors
        assert f"rank 2 saves {tmp_path}/odd, rank 0 {tmp_path}/even: give all the same tag" in odd
        assert "rank 0 failed: KeyError: " in reserved
        assert nowhere.startswith("ConfigError: save_dir=''")
        assert [name for name in names if not name.endswith(".py")] == ["aside", "global_step1", "latest"]
    assert (tmp_path / "latest").read_text() == "global_step1"


def save_both_ways(folder: str) -> None:
    for job in (JOB, PLAIN):
        engine = make_engine(job)
        train_steps(engine, job, batches(job)[:2])
        engine.save_checkpoint(f"{folder}/{job.door}", tag="two")


def test_files_are_those_of_deepspeeds_own_save_and_its_own_engine_loads_them(
    pool: RankPool, tmp_path: pathlib.Path
) -> None:
    pool.run(4, save_both_ways, str(tmp_path), timeout_s=60)
    ours, plain = tmp_path / JOB.door, tmp_path / PLAIN.door
    assert files_below(ours) == files_below(plain)
    (loaded, losses), *_ = pool.run(4, resume, PLAIN, str(ours), timeout_s=60)
    (expected, expected_losses), *_ = pool.run(4, resume, JOB, str(plain), timeout_s=60)
    assert distance(loaded, expected) == 0.0
    assert losses == expected_losses


def files_below(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
