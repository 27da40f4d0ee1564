"""The same faults under the real `deepspeed` launcher: its exit code, the end of all processes, and what ranks said.

The launcher looks at its processes once per second; at the first bad exit it ends the others one after the other, by
SIGTERM and, after 30 s, by SIGKILL: a stopped rank costs 30 s more. Ranks of the job ignore SIGTERM here, so that each
tells why before it ends, however soon the launcher looks. `moe_ep.timeout_s` is 15 s, since a fresh process
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
from tests.ranks import RankPool

# A rank that raises ends for the launcher as a killed one; a stopped one takes a minute; four ranks are slow tests.
IN_CI = "kill.dispatch@3:1"
DEAD_S, STOPPED_S = 15.0, 65.0
LAUNCHED = [pytest.param(case, NUM_RANKS, id=case.fault, marks=pytest.mark.slow) for case in CASES]
LAUNCHED += [pytest.param(case, 2, id=f"{case.fault} of two") for case in CASES if case.fault == IN_CI]


@pytest.mark.parametrize(("case", "num_ranks"), LAUNCHED)
def test_the_launcher_ends_with_an_error_and_no_process_and_the_survivors_have_said_why(
    pool: RankPool, case: Case, num_ranks: int, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    arguments = ["--fault", case.fault, "--timeout_s", "15", *case.arguments]
    outcome = launch(tmp_path / "job", *arguments, num_ranks=num_ranks)
    assert outcome.exit_codes[0] > 0, outcome.output[-2000:]
    assert outcome.ended_after_s() < (STOPPED_S if case.fault.startswith("stop") else DEAD_S)
    for rank in set(range(num_ranks)) - {case.rank}:
        told = outcome.told(rank)
        for words in case.words:
            assert re.search(words.format(rank=case.rank), told), f"rank {rank} says nothing of {words}: {told}"
    if num_ranks == NUM_RANKS:  # forked ranks go on as well, in less time
        check_resumed(pool, outcome, case.arguments, request.getfixturevalue("undisturbed")(case.arguments, num_ranks))
