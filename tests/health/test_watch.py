"""The watch of real ranks: who is where in a slow step, who ends a stuck process, what a stopped store does."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ds_moe_ep.health import rank_state
from ds_moe_ep.health import watchdog as monitor
from ds_moe_ep.health.heartbeat import Place
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.watch import RankWatch, open_watch
from ds_moe_ep.schedule.spans import Tags
from tests.ranks import RankError, RankPool

QUICK_S = 0.1  # between signs, in these tests


@contextmanager
def lines(logger: logging.Logger = monitor.logger) -> Iterator[list[str]]:
    """Lines that the monitor, or another module, logs meanwhile."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def wait_for(condition: Callable[[], object], longest_s: float = 20.0) -> None:
    end_s = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)


def meet(watch: RankWatch) -> None:
    """Until this rank has seen a sign of every other."""
    wait_for(lambda: len(watch._state.heartbeats.seen) == dist.get_world_size())


def be_slow(told: str) -> None:
    """Until the other rank has told of it twice."""
    while not os.access(told, os.F_OK):
        time.sleep(0.02)


def touch_once_told(seen: list[str], told: str) -> None:
    wait_for(lambda: len(seen) >= 2, longest_s=80.0)
    Path(told).touch()


def slow_steps(told: str) -> list[str]:
    """Rank 1 is slow in the seventh step, for which rank 0 waits in a dispatch, until rank 0 has told of it twice."""
    monitor.SHORTEST_SLOW_S = 0.5  # type: ignore[misc]
    rank_state.FEWEST_STEPS = 6  # type: ignore[misc] # no earlier step is told, however slow the machine makes it
    rank_state.SILENCE_S = 60.0  # type: ignore[misc] # nor is a rank silent that has no processor for a while
    watch = open_watch(60.0, QUICK_S)
    meet(watch)
    with lines() as seen:
        if dist.get_rank() == 0:
            threading.Thread(target=touch_once_told, args=(seen, told), daemon=True).start()
        for step in range(7):
            watch.step_begins(step)
            watch.step_begins(step)  # as an engine says before each micro-batch
            if step == 6:
                with watch._state._lock:  # as if all six had been that fast, on any machine
                    watch._state._durations_s.extend([0.05] * 10 * len(watch._state._durations_s))
            if step == 6 and dist.get_rank() == 1:
                be_slow(told)
            watch.enters(Place(Tags("layers.1.moe", "forward"), "dispatch", time.monotonic(), (1 - dist.get_rank(),)))
            dist.barrier()
            watch.leaves()
            watch.step_ends()
        time.sleep(3 * QUICK_S)
    return seen


def test_a_step_of_ten_times_the_median_is_one_line_on_one_rank_and_one_more_at_each_doubling(
    pool: RankPool, tmp_path: Path
) -> None:
    first, second = pool.run(2, slow_steps, str(tmp_path / "told"), timeout_s=100)
    assert second == []
    begins = [
        re.match(r"ds_moe_ep: step 6 has taken ([\d.]+) s, ([\d,]+) times the median of 0\.05", line) for line in first
    ]
    seconds = [float(begin[1]) for begin in begins if begin is not None]
    assert len(first) == len(seconds) >= 2, first
    assert all(int(begin[2].replace(",", "")) >= 10 for begin in begins if begin is not None), first
    assert seconds[0] >= 0.5 and all(b >= 2 * a - 0.2 for a, b in pairwise(seconds)), f"told in tenths: {first}"
    for line in first:
        assert "rank 0 is in layers.1.moe: forward dispatch, waiting for rank 1; " in line
        assert "rank 1 is in be_slow (test_watch.py:" in line


def leave_at_once() -> list[str]:
    """Rank 1 ends as programs do, in the middle of the others' work; what their monitors log."""
    watch = open_watch(60.0, QUICK_S)
    meet(watch)
    dist.barrier()
    with lines() as seen:
        if dist.get_rank() == 1:
            child = os.fork()
            assert child >= 0
            if child == 0:
                os._exit(0)
            watch.end()
        time.sleep(1.5)
    return seen


def test_ranks_that_leave_with_a_goodbye_raise_no_alarm(pool: RankPool) -> None:
    assert pool.run(4, leave_at_once) == [[]] * 4


def stuck(folder: str) -> None:
    """Rank 1 stops. Ranks 0 and 2 wait in somebody else's collective, rank 2 between two calls; rank 3 is slow.

    When rank 0 has ended, rank 3 ends rank 1, and rank 2 itself.
    """
    rank, file = dist.get_rank(), open(f"{folder}/{dist.get_rank()}", "w")  # noqa: SIM115
    watch = open_watch(1.0, QUICK_S)
    pids = [0] * 4
    dist.all_gather_object(pids, os.getpid())
    meet(watch)
    dist.barrier()
    os.dup2(file.fileno(), 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    watch.step_begins(5)
    if rank == 3:
        while not is_dead(pids[0]):  # slow, but it moves
            with watch.among_others("step 5"):
                time.sleep(0.1)
        os.kill(pids[1], signal.SIGKILL)
        return
    if rank == 2:
        threading.Thread(target=end_behind, args=(pids[0],), daemon=True).start()
    with watch.among_others("step 5") if rank == 0 else nullcontext():
        dist.all_reduce(torch.zeros(1))


def end_behind(pid: int) -> None:
    """Ends this process when another one has ended."""
    wait_for(lambda: is_dead(pid), 60.0)
    os._exit(0)


def test_a_process_that_a_stopped_rank_holds_up_inside_a_call_ends_with_an_error_and_no_other_does(
    pool: RankPool,
    tmp_path: Path,
) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(4, stuck, str(tmp_path), timeout_s=30)
    messages = {rank: failure.message for rank, failure in caught.value.failures.items()}
    assert messages[0].startswith(f"exit code {monitor.EXIT_CODE}")
    assert messages[1].startswith("exit code -9")
    assert messages[2].startswith("exit code 0")
    assert 3 not in messages
    told = (tmp_path / "0").read_text()
    assert "ds_moe_ep: rank 0 has waited for " in told and "s in step 5, in " in told
    assert "rank 1 (pid " in told and "is stopped, last seen in " in told and "moe_ep.timeout_s sets the limit" in told
    assert "the process ends" not in (tmp_path / "2").read_text() + (tmp_path / "3").read_text()


def wait_apart(folder: str, how: str) -> None:
    """Rank 0 waits in a call of the engine's; rank 1 waits for it in another place, in the same one, or comes late."""
    rank, file = dist.get_rank(), open(f"{folder}/{dist.get_rank()}", "w")  # noqa: SIM115
    watch, own = open_watch(1.0, QUICK_S), dist.new_group([0, 1])
    meet(watch)
    dist.barrier()
    os.dup2(file.fileno(), 2)
    with watch.among_others("step 5") if rank == 0 or how == "together" else nullcontext():
        if how == "late" and rank == 1:
            time.sleep(7.0)
        if how == "together":
            threading.Timer(7.0, os._exit, (0,)).start()
            dist.recv(torch.zeros(1), 1 - rank)  # neither sends: to the watch, a collective that is slow
        elif rank == 0 or how == "late":
            dist.all_reduce(torch.zeros(1))
        else:
            with told_first(f"{folder}/1", "first error: rank 0"):
                dist.barrier(group=own)


@contextmanager
def told_first(path: str, text: str) -> Iterator[None]:
    """A scope whose error waits until this rank's watchdog has written that text: the process ends with it."""
    try:
        yield
    except RuntimeError:
        wait_for(lambda: text in Path(path).read_text())
        raise


def test_of_ranks_that_wait_for_each_other_in_different_places_the_one_in_a_call_of_the_engines_ends_with_an_error(
    pool: RankPool,
    tmp_path: Path,
) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(2, wait_apart, str(tmp_path), "apart", timeout_s=30)
    messages = {rank: failure.message for rank, failure in caught.value.failures.items()}
    assert messages[0].startswith(f"exit code {monitor.EXIT_CODE}")
    assert "Connection closed by peer" in messages[1]
    told = (tmp_path / "0").read_text()
    assert "in step 5, in all_reduce, called from wait_apart (test_watch.py:" in told
    assert "no rank moves, and they wait for each other: rank 1 is in barrier, called from wait_apart" in told
    assert "first error: rank 0: PeerError: rank 0 has waited for" in (tmp_path / "1").read_text()


def test_a_rank_that_comes_late_and_a_collective_that_is_slow_end_no_process(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, wait_apart, str(tmp_path), "late", timeout_s=30)
    with pytest.raises(RankError, match="exit code 0, no answer"):
        pool.run(2, wait_apart, str(tmp_path), "together", timeout_s=30)
    assert not any("the process ends" in (tmp_path / str(rank)).read_text() for rank in range(2))


def stopped_store(folder: str) -> str:
    """Rank 0 serves a store and stops; rank 1 asks why it does not answer."""
    rank, limit = dist.get_rank(), timedelta(seconds=20)
    ports = [0]
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    if own is not None:
        ports = [own.port]
    dist.broadcast_object_list(ports, 0)
    store = own or dist.TCPStore("127.0.0.1", ports[0], is_master=False, timeout=limit)
    watch = RankWatch(PrefixStore("watch", store), rank, 2, 60.0, QUICK_S)
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    meet(watch)
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for(lambda: watch._state.view().statuses[0] is ProcessStatus.STOPPED)
    ask, asked = watch._state.heartbeats.ask, []
    watch._state.heartbeats.ask = lambda limit_s: asked.append(limit_s) or ask(limit_s)  # type: ignore
    text = watch.explain([0])
    Path(folder, "1").write_text(f"{sum(asked)} {text}")
    os.kill(pids[0], signal.SIGKILL)
    return text


def test_a_stopped_rank_that_serves_the_store_is_named_without_waiting_for_the_store(
    pool: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match="rank 0: Died: exit code -9"):
        pool.run(2, stopped_store, str(tmp_path), timeout_s=30)
    asked_s, _, text = (tmp_path / "1").read_text().partition(" ")
    assert "rank 0 (pid " in text and " is stopped, last seen in " in text
    assert float(asked_s) <= 1, "seconds that it would wait for a store, which answers nobody until its rank is ended"


def far_apart() -> str:
    """Each rank as if on a machine of its own; rank 1 dies, and rank 0 asks why it does not answer."""
    rank = dist.get_rank()
    here = replace(rank_state.identify(), host=f"n{rank}", machine=f"m{rank}")
    rank_state.identify = lambda: here  # type: ignore[assignment]
    watch = open_watch(60.0, QUICK_S)
    meet(watch)
    assert f"rank {1 - rank} is in " in watch.explain([1 - rank])
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        os._exit(9)
    wait_for(lambda: is_dead(pids[1]))
    return watch.explain([1])


def is_dead(pid: int) -> bool:
    """True where it has ended, if its parent has asked for it or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def report_far_apart(folder: str) -> None:
    Path(folder, "0").write_text(far_apart())


def test_a_rank_on_another_machine_is_judged_by_its_signs_alone(pool: RankPool, tmp_path: Path) -> None:
    """For how long an explanation waits for them is told by a planted clock, in test_causes.py."""
    with pytest.raises(RankError, match="rank 1: Died: exit code 9"):
        pool.run(2, report_far_apart, str(tmp_path))
    text = (tmp_path / "0").read_text()
    silence = re.search(r" on n1\) has given no sign of life for (\d+) s, last seen in ", text)
    assert silence is not None and int(silence[1]) >= 3, text


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ds_moe_ep ")]


def open_and_end() -> list[object]:
    """Threads and hook behind watches that were ended, or that nobody holds any more."""
    hook = sys.excepthook
    for how in ("end", "drop"):
        watch = open_watch(60.0, QUICK_S)
        assert len(own_threads()) == 2 and sys.excepthook is not hook
        if how == "end":
            watch.end()
            watch.end()
        del watch
        gc.collect()
        wait_for(lambda: not own_threads())
    return [own_threads(), sys.excepthook is hook]


def test_a_watch_ends_with_whoever_holds_it_and_leaves_nothing_behind(pool: RankPool) -> None:
    assert pool.run(2, open_and_end) == [[[], True]] * 2


def fork_a_child() -> tuple[int, str]:
    """Rank 0 forks a child that ends as programs do; then rank 1 looks at rank 0."""
    watch = open_watch(60.0, QUICK_S)
    meet(watch)
    code = -1
    if dist.get_rank() == 0:
        child = os.fork()
        if child == 0:
            watch._finalizer()  # as the interpreter does at its end
            sys.excepthook(ValueError, ValueError("of the child"), None)
            os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    dist.barrier()
    time.sleep(5 * QUICK_S)
    told = watch.explain([1 - dist.get_rank()])
    dist.barrier()
    return code, told


def test_a_forked_child_neither_says_goodbye_nor_tells_of_faults_in_the_ranks_name(pool: RankPool) -> None:
    (code, _), (_, told) = pool.run(2, fork_a_child)
    assert code == 3
    assert told.startswith("rank 0 is in ")


def say_goodbye() -> str:
    watch = open_watch(60.0, QUICK_S)
    meet(watch)
    dist.barrier()
    if dist.get_rank() == 0:
        watch.end()
    dist.barrier()
    time.sleep(3 * QUICK_S)
    told = "" if dist.get_rank() == 0 else watch.explain([0])
    dist.barrier()
    return told


def test_a_rank_that_ended_well_has_ended_and_is_not_gone(pool: RankPool) -> None:
    assert " has ended, last seen in " in pool.run(2, say_goodbye)[1]
