"""The harness itself: ranks that fail are named, ranks that hang are killed, no rank is left behind."""

import contextlib
import logging
import os
import pathlib
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.engine import seams
from ds_moe_ep.health import watchdog
from ds_moe_ep.health.watch import RankWatch, Unwatched, open_watch
from tests.load_clock import Stopwatch, without_load
from tests.ranks import COUNTED_IN, RankError, RankPool, run_ranks


def sum_of_ranks(scale: float) -> tuple[int, torch.Tensor]:
    total = torch.full((3,), scale * dist.get_rank())
    dist.all_reduce(total)
    return os.getpid(), total


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"bad luck on {rank}")
    dist.barrier()


STARTED_WITHIN_S = (4, 15, 45)  # all ranks of a test; the longer limits where a busy machine starts them late


def hang_on(rank: int) -> int:
    if dist.get_rank() == rank:
        time.sleep(600)
    return dist.get_rank()


def end_and_crash() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    os.kill(os.getpid(), signal.SIGSEGV)


def report_pid(folder: str) -> None:
    with open(f"{folder}/{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    hang_on(dist.get_rank())


def environment() -> dict[str, str]:
    return dict(os.environ) | {"started": str(dist.is_initialized()), "threads": str(torch.get_num_threads())}


def open_files(most: int) -> int:
    """How many files and sockets this process has, as soon as they are no more than these, or behind a limit."""
    end_s = time.monotonic() + 20
    while len(os.listdir("/dev/fd")) > most and time.monotonic() < end_s:
        time.sleep(0.02)
    return len(os.listdir("/dev/fd"))


def leave_traces(ep_size: int, files: int) -> tuple[int, torch.Tensor, str, list[int], int, int]:
    """This process, and what an earlier function may have left in it: a number, a variable, a group of experts.

    And the files that are open before and behind it; no more than `files` before, as soon as what ends has ended.
    """
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed("gloo")
    found = os.getpid(), torch.rand(2), os.environ.get("LEFT", "")
    before = open_files(files)
    os.environ["LEFT"] = "by an earlier function"
    groups._create_expert_and_data_parallel(ep_size)
    sizes = [dist.get_world_size(group) for group in groups._get_expert_parallel_group_dict().values()]
    return *found, sizes, before, open_files(1_000)


def count_apart() -> tuple[list[object], float]:
    """What this rank finds, and the sum over a new group; it has then met the other rank in a watch.

    It leaves other names in the package, its errors and DeepSpeed's lines unwritten, and counts of groups and watches
    that only rank 0 has.
    """
    logger = logging.getLogger("DeepSpeed")
    found = [watchdog.EXIT_CODE, RankWatch.explain.__qualname__, os.fstat(2).st_ino, logger.level, len(logger.filters)]
    total = torch.ones(1)
    dist.all_reduce(total, group=dist.new_group([0, 1]))
    watch, end_s = seams.watch_of_world(60.0), time.monotonic() + 20
    while len(watch._state.heartbeats.seen) < 2:
        assert time.monotonic() < end_s, "the ranks do not meet"
        time.sleep(0.02)
    dist.barrier()
    if dist.get_rank() == 0:
        c10d._world.group_count += 1
        open_watch(60.0)
    watchdog.EXIT_CODE, RankWatch.explain = 0, Unwatched.explain
    logger.setLevel(logging.CRITICAL)
    logger.addFilter(lambda record: False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return found, float(total)


def is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_results_come_back_in_rank_order_and_no_process_remains() -> None:
    results = run_ranks(4, sum_of_ranks, 2.0)
    assert all(torch.equal(total, torch.full((3,), 12.0)) for _, total in results)
    assert len({pid for pid, _ in results}) == 4
    assert all(is_gone(pid) for pid, _ in results)


def test_sixteen_ranks_start_in_seconds() -> None:
    run_ranks(1, environment)  # the fork server's own start is paid once a session
    for _ in range(3):  # a busy machine may need longer; one that is always so fails
        start = time.monotonic()
        run_ranks(16, sum_of_ranks, 1.0)
        if (took_s := time.monotonic() - start) < 20:
            break
    assert took_s < 20, "2 to 3 s on an idle machine with 2 cores"


def test_an_error_on_one_rank_is_reported_first_with_its_rank_text_and_traceback() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(4, fail_on, 2)
    rank, failure = next(iter(caught.value.failures.items()))
    assert (rank, failure.type_name, failure.message) == (2, "ValueError", "bad luck on 2")
    assert "in fail_on" in failure.traceback
    assert "rank 2: ValueError: bad luck on 2" in str(caught.value)


def test_a_hanging_rank_is_killed_at_the_limit_and_its_stack_is_shown() -> None:
    for limit_s in STARTED_WITHIN_S:
        watch = Stopwatch()
        with pytest.raises(RankError, match="rank 1: Unanswered: no answer within the limit") as caught:
            run_ranks(2, hang_on, 1, timeout_s=limit_s)
        assert without_load([watch.read()]) < limit_s + 10
        if list(caught.value.failures) == [1]:
            break
    assert list(caught.value.failures) == [1]
    assert "hang_on" in caught.value.failures[1].traceback


def test_a_rank_that_dies_is_reported_with_its_exit_code_and_one_that_crashes_with_its_stack() -> None:
    with pytest.raises(RankError, match="rank 0: Died: exit code 7") as caught:
        run_ranks(2, end_and_crash, timeout_s=20)
    assert "exit code -11" in caught.value.failures[1].message
    assert "end_and_crash" in caught.value.failures[1].traceback and not caught.value.failures[0].traceback


def test_no_rank_survives_a_time_limit(tmp_path) -> None:
    for limit_s in STARTED_WITHIN_S:
        folder = tmp_path / str(limit_s)
        folder.mkdir()
        with pytest.raises(RankError):
            run_ranks(3, report_pid, str(folder), timeout_s=limit_s)
        pids = [int(path.read_text()) for path in folder.iterdir()]
        if len(pids) == 3:
            break
    assert len(pids) == 3
    assert all(is_gone(pid) for pid in pids)


def test_pooled_ranks_run_one_function_after_the_other_and_find_nothing_of_those_before() -> None:
    pool = RankPool()
    first = pool.run(2, leave_traces, 2, 1_000)
    second = pool.run(2, leave_traces, 1, max(before for *_, before, _ in first))
    pool.close()
    for one, other in zip(first, second, strict=True):
        (pid, number, _, sizes, before, behind), (same_pid, same_number, left, later_sizes, files, _) = one, other
        assert pid == same_pid and torch.equal(number, same_number) and left == ""
        assert (sizes, later_sizes) == ([2], [1])
        assert files <= before < behind, "groups of an earlier function have ended"
    assert all(is_gone(pid) for pid, *_ in first)


def test_pooled_ranks_have_the_packages_own_names_and_count_alike_whatever_one_function_did() -> None:
    pool = RankPool()
    first, second, third = (pool.run(2, count_apart, timeout_s=30) for _ in range(3))
    pool.close()
    assert first == second == third
    assert [(found[0], total) for found, total in first] == [(watchdog.EXIT_CODE, 2.0)] * 2


def test_pooled_ranks_that_fail_are_named_and_replaced(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COUNTED_IN, str(tmp_path / "worlds"))
    pool = RankPool()
    [(before, _), _] = pool.run(2, sum_of_ranks, 1.0)
    with pytest.raises(RankError, match="rank 1: ValueError: bad luck on 1"):
        pool.run(2, fail_on, 1)
    assert is_gone(before)
    with pytest.raises(RankError, match="rank 1: Unanswered: no answer within the limit"):
        pool.run(2, hang_on, 1, timeout_s=3)
    [(after, total), _] = pool.run(2, sum_of_ranks, 3.0)
    pool.close()
    assert after != before and torch.equal(total, torch.full((3,), 3.0))
    worlds = (tmp_path / "worlds").read_text().splitlines()
    assert len(worlds) == 3 and all(line.startswith("2 tests/test_ranks.py::test_pooled") for line in worlds)


def test_ranks_see_the_launchers_variables_and_can_start_without_a_process_group() -> None:
    for rank, seen in enumerate(run_ranks(2, environment, env={"EXTRA": "yes"}, process_group=False)):
        assert seen["started"] == "False"
        assert (seen["RANK"], seen["WORLD_SIZE"], seen["DS_ACCELERATOR"]) == (str(rank), "2", "cpu")
        assert (seen["EXTRA"], seen["threads"]) == ("yes", "1")


def test_a_port_is_free_and_none_that_the_system_gives_to_another_connection_meanwhile() -> None:
    first = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with contextlib.ExitStack() as listening:
        for _ in range(20):  # each stays taken, and the next is another
            server = listening.enter_context(socket.socket())
            server.bind(("127.0.0.1", port := free_port()))
            assert port < first
    with socket.socket() as outgoing:  # the control: what the system chooses by itself is not below
        outgoing.bind(("127.0.0.1", 0))
        assert outgoing.getsockname()[1] >= first
