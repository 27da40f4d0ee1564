"""The same faults under the real `deepspeed` launcher: its exit code, the end of all processes, and what ranks said.

The launcher looks at its processes once per second; at the first bad exit it ends the others one after the other, by
SIGTERM and, after 30 s, by SIGKILL: a stopped rank costs 30 s more. `moe_ep.timeout_s` is 15 s, since a fresh process
imports much in its first step. Stated bounds, from the fault to the end of the launcher: 15 s where a process dies or
raises, 65 s where one is stopped.
"""

from __future__ import annotations

import pathlib
import re

import pytest

from tests.faults.launch import launch
from tests.faults.outcomes import NUM_RANKS
from tests.faults.test_forked_faults import CASES, Case, check_resumed, undisturbed  # noqa: F401 (a fixture)

IN_CI = ("kill.dispatch@3:1",)  # a rank that raises ends for the launcher as this one; a stopped one takes a minute
DEAD_S, STOPPED_S = 15.0, 65.0


def launched(case: Case) -> object:
    return pytest.param(case, id=case.fault, marks=() if case.fault in IN_CI else pytest.mark.slow)


@pytest.mark.parametrize("case", [launched(case) for case in CASES])
def test_the_launcher_ends_with_an_error_and_no_process_and_the_survivors_have_said_why(
    case: Case, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    outcome = launch(tmp_path / "job", "--fault", case.fault, "--timeout_s", "15", *case.arguments)
    assert outcome.exit_codes[0] > 0, outcome.output[-2000:]
    assert outcome.ended_after_s() < (STOPPED_S if case.fault.startswith("stop") else DEAD_S)
    for rank in set(range(NUM_RANKS)) - {case.rank}:
        told = outcome.told(rank)
        for words in case.words:
            assert re.search(words.format(rank=case.rank), told), f"rank {rank} says nothing of {words}: {told}"
    check_resumed(outcome, case.arguments, request.getfixturevalue("undisturbed")(case.arguments))
