"""Cases that the watch must not take for a failure: a store or a job that was paused, ranks that are done and gone."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ds_moe_ep.errors import PeerError
from ds_moe_ep.health import rank_state, store, watch, watchdog
from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.heartbeat import Heartbeat, Identity, Place
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.rank_state import RankState
from ds_moe_ep.health.store import HeartbeatStore
from ds_moe_ep.health.watch import RankWatch, Unwatched, open_watch
from ds_moe_ep.schedule.spans import Tags
from tests.health.test_watch import QUICK_S, is_dead, lines, meet, wait_for
from tests.ranks import RankError, RankPool, run_ranks, signal_itself


def stop_until(condition: str) -> None:
    """Stops this process until a command of the shell succeeds, which another process asks again and again."""
    pid = os.getpid()
    script = f"until grep -q '^State:.T' /proc/{pid}/status; do sleep 0.05; done; "
    script += f"until {condition}; do kill -0 {pid} || exit; sleep 0.05; done; kill -CONT {pid}"
    subprocess.Popen(["sh", "-c", script], stderr=subprocess.DEVNULL)
    signal_itself(signal.SIGSTOP)


def look(own_watch: RankWatch, times: int) -> None:
    """Waits until the watchdog has looked so often from now on."""
    found = own_watch._finalizer.peek()
    assert found is not None
    dog: watchdog.Watchdog = found[2][1]
    for _ in range(times):
        before_s = dog._looked_s
        wait_for(lambda: dog._looked_s != before_s)  # noqa: B023


def watch_at_a_store_of_rank_0(timeout_s: float, limit_s: float = 30.0) -> RankWatch:
    rank, size, limit = dist.get_rank(), dist.get_world_size(), timedelta(seconds=limit_s)
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit) if rank == 0 else None
    ports = [own.port if own is not None else 0]
    dist.broadcast_object_list(ports, 0)
    store = own or dist.TCPStore("127.0.0.1", ports[0], is_master=False, timeout=limit)
    own_watch = RankWatch(PrefixStore("watch", store), rank, size, timeout_s, QUICK_S, rank == 0)
    meet(own_watch)
    dist.barrier()
    return own_watch


def paused_store(folder: str) -> bool:
    """Rank 0, which serves the store, pauses until a look of rank 1 takes twice the store's limit.

    True where rank 1, which lost the store with that look, has not found it again.
    """
    store.RETRY_S = 0.5  # type: ignore[misc]
    own_watch = watch_at_a_store_of_rank_0(60.0, limit_s=1.0)
    own = own_watch._state.heartbeats
    first = own._store
    if dist.get_rank() == 0:
        stop_until(f"test -e {folder}/late")
    else:
        wait_for(lambda: own_watch._state.view().statuses[0] is ProcessStatus.STOPPED)
        wait_for(lambda: own._num_begun > own._num_done)
        time.sleep(2.0)
        Path(folder, "late").touch()
        wait_for(lambda: own._store is not first and not own.is_lost)
        beat = own.seen[0].heartbeat.beat
        wait_for(lambda: own.seen[0].heartbeat.beat > beat)
    dist.barrier()
    return own.is_lost


def test_a_store_that_was_paused_is_used_again_over_a_new_connection(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, paused_store, str(tmp_path)) == [False, False]


def paused_job(folder: str) -> str:
    """Rank 1 pauses, then rank 0 does for longer than the limit, and goes on before rank 1."""
    own_watch = open_watch(1.0, QUICK_S)
    meet(own_watch)
    dist.barrier()
    if dist.get_rank() == 0:
        wait_for(lambda: own_watch._state.view().statuses[1] is ProcessStatus.STOPPED)
    with own_watch.among_others("step 1"):
        stop_until("sleep 5" if dist.get_rank() == 0 else f"test -e {folder}/goes_on")
        look(own_watch, 3)
        Path(folder, "goes_on").touch()
    dist.barrier()
    return "healthy"


def test_a_pause_of_the_whole_job_ends_no_process(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, paused_job, str(tmp_path)) == ["healthy"] * 2


def be_left(folder: str) -> None:
    """Rank 1 goes without a goodbye. Rank 0 does not need it, then it does."""
    own_watch = open_watch(60.0, QUICK_S)
    meet(own_watch)
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    guard = AbortGuard(0, (0, 1), ())
    own_watch.guards(guard)
    with lines() as seen:
        wait_for(lambda: own_watch._state.view().statuses[1] is ProcessStatus.GONE)
        look(own_watch, 5)
        before = (guard.failure, list(seen))
        own_watch.enters(Place(Tags("layers.1.moe", "forward"), "dispatch", time.monotonic(), (1,)))
        wait_for(lambda: guard.failure)
    Path(folder, "0").write_text(f"{before} {guard.failure} {len(seen)}")


def test_a_rank_that_is_gone_ends_the_lanes_of_those_that_wait_for_it_and_of_no_other(
    pool: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match="rank 1: Died: exit code 0"):
        pool.run(2, be_left, str(tmp_path))
    text = (tmp_path / "0").read_text()
    assert text.startswith("(None, []) rank 1 (pid ") and " is gone, last seen in " in text and text.endswith(" 1")


def end_without_the_store(folder: str) -> None:
    """Rank 0, which serves the store, says goodbye and goes; the goodbye of rank 2 cannot be posted any more."""
    rank_state.LEAVING_S = 0.5  # type: ignore[misc]
    own_watch, rank = watch_at_a_store_of_rank_0(60.0), dist.get_rank()
    pids = [0] * 3
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        own_watch.end()
        wait_for(Path(folder, "read").exists)
        os._exit(0)
    if rank == 2:
        wait_for(lambda: is_dead(pids[0]))
        own_watch.end()
        os._exit(0)
    own = own_watch._state.heartbeats
    with lines() as seen, own_watch.among_others("step 1"):
        wait_for(lambda: own.seen[0].heartbeat.has_left)
        Path(folder, "read").touch()
        wait_for(lambda: own.is_lost and is_dead(pids[2]))
        look(own_watch, 10)
    Path(folder, "1").write_text(str((seen, own_watch._state.view().statuses[2].name)))


def test_a_goodbye_that_no_store_took_is_no_alarm(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError):
        pool.run(3, end_without_the_store, str(tmp_path))
    assert (tmp_path / "1").read_text() == "([], 'GONE')"


def end_as_a_child_of_multiprocessing() -> bool:
    own_watch = open_watch(60.0, QUICK_S)
    meet(own_watch)
    dist.barrier()
    if dist.get_rank() == 1:
        multiprocessing.util._run_finalizers(0)
    else:
        wait_for(lambda: own_watch._state.heartbeats.seen[1].heartbeat.has_left)
    dist.barrier()
    return own_watch._state.has_left


def test_children_of_multiprocessing_say_goodbye(pool: RankPool) -> None:
    assert pool.run(2, end_as_a_child_of_multiprocessing) == [False, True]


def meet_in_memory() -> tuple[bool, list[str]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with lines(watch.logger) as seen:
        return isinstance(open_watch(60.0), Unwatched), seen


def test_ranks_that_meet_at_another_kind_of_store_are_not_watched_and_told_so() -> None:
    [(is_unwatched, seen)] = run_ranks(1, meet_in_memory, process_group=False)
    assert is_unwatched and len(seen) == 1 and "the ranks meet at a HashStore" in seen[0]


def faults_told() -> list[str]:
    """The fault that a rank tells of after each of several errors."""
    told, own = [], RankState(dist.HashStore(), 0, 1, 0.1, False)
    steps = [
        (own.fail, PeerError("rank 3 did not answer"), ("a pass",)),
        (own.fail, ValueError("bad luck"), ("a pass",)),
        (own.fail, ValueError("later"), ("a pass",)),
        (own.die, ValueError("bad luck"), ()),
        (own.die, PeerError("rank 3 did not answer"), ()),
        (own.die, KeyError("the end"), ()),
    ]
    for tell, error, words in steps:
        tell(error, *words)
        told.append(f"{own.fault}")
    own.heartbeats.end(1.0)
    return told


def test_the_first_fault_of_a_ranks_own_is_told_until_it_dies_of_another(pool: RankPool) -> None:
    [told] = pool.run(1, faults_told)
    assert told == [
        "PeerError: rank 3 did not answer (in a pass)",
        *["ValueError: bad luck (in a pass)"] * 4,
        "KeyError: 'the end' (in the process, which ends)",
    ]


ELSEWHERE = Identity("n1", "", 1, 0)


def serve_and_leave() -> list[tuple[float, int, bool]]:
    """How long whoever serves the store waits with its last sign for a rank that stays, and for one that has left.

    Beside the seconds how often it looks, and True where the sign is posted.
    """
    found = []
    for has_left in (False, True):
        memory = dist.HashStore()
        memory.set("1", Heartbeat(1, ELSEWHERE, has_left=has_left).pack())
        own, looks, began_s = RankState(memory, 0, 2, 0.1, True), list[float](), time.monotonic()
        ask = own.heartbeats.ask
        own.heartbeats.ask = lambda limit_s: looks.append(limit_s) or ask(20.0)  # type: ignore # noqa: B023
        own.say_goodbye()
        found.append((time.monotonic() - began_s, len(looks), Heartbeat.unpack(memory.get("0")).has_left))
    return found


def test_whoever_serves_the_store_leaves_two_seconds_later_or_behind_the_others(pool: RankPool) -> None:
    [[(for_one_that_stays_s, _, is_posted), (_, num_looks, is_posted_too)]] = pool.run(1, serve_and_leave)
    assert is_posted and is_posted_too
    assert for_one_that_stays_s > 1.9 and num_looks == 1, "no second look where the first shows that it has left"


def end_while_a_sign_takes_long() -> bool:
    """True where the sign that is written while the thread ends is in the store behind the end."""
    memory, is_ending = dist.HashStore(), []

    def write() -> Heartbeat:
        has_left = bool(is_ending)
        time.sleep(0.3)
        return Heartbeat(0, ELSEWHERE, has_left=has_left)

    own = HeartbeatStore(memory, 0, 1, 60.0, write)
    wait_for(lambda: own.num_read)
    is_ending.append(True)
    own.end(10.0)
    return Heartbeat.unpack(memory.get("0")).has_left


def test_the_end_waits_until_the_last_sign_is_posted(pool: RankPool) -> None:
    assert pool.run(1, end_while_a_sign_takes_long) == [True]


def lose_a_server_elsewhere(folder: str) -> None:
    """Rank 0 serves the store, as if on a machine of its own, and pauses, while rank 1 is in a call of the engine's."""
    rank_state.SILENCE_S, watchdog.MARGIN_S = 1.0, 0.5  # type: ignore[misc]
    rank, here = dist.get_rank(), rank_state.identify()
    rank_state.identify = lambda: replace(here, machine=f"m{rank}")  # type: ignore[assignment]
    own_watch = watch_at_a_store_of_rank_0(1.0, limit_s=1.0)
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        stop_until(f"! kill -0 {pids[1]}")
        os._exit(0)
    with open(f"{folder}/1", "w") as file:
        os.dup2(file.fileno(), 2)
    with own_watch.among_others("step 5"):
        time.sleep(20.0)


def test_a_process_that_waits_while_the_stores_server_on_another_machine_is_lost_ends_with_an_error(
    pool: RankPool,
    tmp_path: Path,
) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(2, lose_a_server_elsewhere, str(tmp_path), timeout_s=30)
    assert caught.value.failures[1].message.startswith(f"exit code {watchdog.EXIT_CODE}")
    told = (tmp_path / "1").read_text()
    assert "s in step 5, in " in told and "the ranks' store, on rank 0 (pid " in told and "does not answer" in told
