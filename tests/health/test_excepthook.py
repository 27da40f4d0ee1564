"""An exception that nobody catches: the other ranks are told, and the process ends soon, whatever is on its way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ds_moe_ep.health.excepthook import LONGEST_END_S, chain
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def die(self, error: BaseException) -> None:
        self.errors.append(error)


def hooked(uses_alarm: bool, is_held: bool, is_interactive: bool) -> tuple[list[str], list[str], list[int]]:
    """On a rank: what the program's hook and the teller were told of two errors, and the alarms that were set.

    The second error comes when the teller is off the hook.
    """
    seen, alarms = list[str](), list[int]()
    signal.alarm = alarms.append  # type: ignore[assignment]
    sys.excepthook = lambda kind, error, trace: seen.append(str(error))
    if is_interactive:
        sys.ps1 = ">>> "
    if uses_alarm:
        signal.signal(signal.SIGALRM, lambda *_: None)
    teller = Recorder()
    told = teller.errors
    unchain = chain(teller)
    if not is_held:
        del teller
    sys.excepthook(ValueError, ValueError("first"), None)
    unchain()
    sys.excepthook(ValueError, ValueError("second"), None)
    return seen, [str(error) for error in told], alarms


Seen = dict[str, tuple[list[str], list[str], list[int]]]
PROGRAMS: dict[str, dict[str, bool]] = {
    "plain": {"uses_alarm": False, "is_held": True, "is_interactive": False},
    "with an alarm": {"uses_alarm": True, "is_held": True, "is_interactive": False},
    "interactive": {"uses_alarm": False, "is_held": True, "is_interactive": True},
    "without a teller": {"uses_alarm": False, "is_held": False, "is_interactive": False},
}


def one_of_them() -> tuple[list[str], list[str], list[int]]:
    """The program of this rank."""
    return hooked(**list(PROGRAMS.values())[int(os.environ["RANK"])])


@pytest.fixture(scope="module")
def seen() -> Seen:
    """By program, in a process of its own each: pytest's has an alarm."""
    return dict(zip(PROGRAMS, run_ranks(len(PROGRAMS), one_of_them, process_group=False), strict=True))


def test_the_programs_own_hook_runs_then_the_ranks_are_told_and_an_alarm_is_set(seen: Seen) -> None:
    assert seen["plain"] == (["first", "second"], ["first"], [LONGEST_END_S])


def test_a_program_that_uses_the_alarm_keeps_it(seen: Seen) -> None:
    assert seen["with an alarm"] == (["first", "second"], ["first"], [])


def test_an_interactive_interpreter_goes_on_after_its_exceptions(seen: Seen) -> None:
    assert seen["interactive"] == (["first", "second"], [], [])


def test_a_teller_that_is_gone_is_not_missed(seen: Seen) -> None:
    assert seen["without a teller"] == (["first", "second"], [], [])


# Two ranks forked from one interpreter that end as programs do. Rank 0 raises while its all-to-all is on its way, for
# which gloo's destructor waits up to the group's limit.
PROGRAM = """
    import faulthandler, os, sys, time
    import torch, torch.distributed as dist
    from ds_moe_ep.comm.lane_groups import open_lanes

    there, here = os.pipe()
    parent = os.getpid()
    rank = 0 if os.fork() else 1
    faulthandler.dump_traceback_later(200, exit=True)  # no process outlives the test
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(here, str(store.port).encode())
    else:
        store = dist.TCPStore("127.0.0.1", int(os.read(there, 9)), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    watched = sys.argv[1] == "watched"
    lanes = open_lanes([[0, 1]], 60.0 if watched else 8.0)
    if not watched:
        lanes.watch.end()
    if rank == 0:
        work = dist.all_to_all_single(torch.zeros(2, 1), torch.zeros(2, 1), group=lanes.lanes["combine"], async_op=True)
        print("held from", time.monotonic(), flush=True)
        raise ValueError("bad luck")
    began_s = time.monotonic()
    try:
        lanes.exchange_counts(torch.zeros(2, 1, dtype=torch.int64))
    except RuntimeError as error:
        print("released after", time.monotonic() - began_s, lanes.watch.explain([0]), flush=True)
    while os.getppid() == parent and time.monotonic() < began_s + 60:  # this end of the all-to-all stays open
        time.sleep(0.05)
    print("held to", time.monotonic(), flush=True)
"""


def run_program(how: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """For how long rank 0's process was held up, and how the program ended."""
    program = textwrap.dedent(PROGRAM)
    words = [sys.executable, "-c", program, how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240)
    [from_s], [to_s] = (re.findall(rf"^held {end} (\S+)$", done.stdout, re.M) for end in ("from", "to"))
    return float(to_s) - float(from_s), done  # of one clock, the machine's


def test_a_process_that_ends_with_an_exception_wakes_its_peers_and_is_not_held_up_by_what_is_on_its_way() -> None:
    for _ in range(5):
        held_s, done = run_program("watched")
        if done.returncode != -signal.SIGALRM:  # the last resort, where a busy machine takes as long as that
            break
    assert done.returncode == 1, done.stderr
    assert "ValueError: bad luck" in done.stderr
    assert "first error: rank 0: ValueError: bad luck (in the process, which ends)" in done.stdout, done
    assert held_s < 19, "15 s at most, whatever the group's limit"


def test_without_a_watch_gloo_holds_the_process_up_to_the_groups_limit() -> None:
    """The control: what the alarm and the closing of connections are for."""
    held_s, done = run_program("unwatched")
    assert done.returncode == 1 and "ValueError: bad luck" in done.stderr
    assert held_s > 7, "of a limit of 8 s"
