"""Faults in one of four ranks: every survivor ends by itself, in time, and says who and where; then the job resumes.

Nobody helps the survivors: the runner ends no rank. `moe_ep.timeout_s` is 6 s. Stated bounds, from the fault to the end
of the last survivor's process: 6 s where a process dies or raises (measured: under 1 s on an idle machine), 16 s where
it is stopped and nothing but the time limit can tell (measured: 6 to 9 s); on a busy machine without the seconds for
which a rank was ready to run and had no processor (`tests.load_clock`).
"""

from __future__ import annotations

import functools
import pathlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.faults import train
from tests.faults.forked import run_forked
from tests.faults.outcomes import NUM_RANKS, Losses, Outcome
from tests.faults.train import CHECKPOINTS
from tests.ranks import RankPool

DEAD_S, STOPPED_S = 6.0, 16.0
FORWARD, BACKWARD = (rf"layers\.1: {phase} (dispatch|combine)" for phase in ("forward", "backward"))
GONE = r"rank {rank} \(pid \d+ on \S+\) is gone"
STOPPED = r"rank {rank} \(pid \d+ on \S+\) is stopped"
BROKEN = r"rank {rank}: ValueError: this expert cannot go on"

REPLICAS = ("--replicas", "1")
ROUNDING = 5e-7  # of a loss: four places of its last bit


@dataclass(frozen=True)
class Case:
    """A fault, the exit code that it gives its own rank, and what each survivor says."""

    fault: str
    code: int
    words: tuple[str, ...]
    limit_s: float = DEAD_S
    arguments: tuple[str, ...] = ()
    resumes: bool = False  # one of each way to end: the checkpoint that the others leave is the same

    @property
    def rank(self) -> int:
        return int(self.fault[-1])


CASES = [
    Case("kill.dispatch@3:1", -9, (FORWARD, GONE)),
    Case("kill.combine@3:2", -9, (FORWARD, GONE)),
    Case("kill.backward@3:0", -9, (BACKWARD, GONE), resumes=True),
    Case("kill.dispatch@3:2", -9, (FORWARD, GONE), arguments=REPLICAS),
    Case("kill.weights@3:1", -9, (r"layers\.[01]: forward (replicas|exchange of counts)", GONE), arguments=REPLICAS),
    Case("kill.sums@3:2", -9, (r"layers\.[01]: backward (replicas|exchange of counts)", GONE), arguments=REPLICAS),
    Case("kill.reduce@3:1", -9, (r"engine\.(backward|step), step 3: a collective of DeepSpeed's failed", GONE)),
    Case("kill.save@3:1", -9, (r"/checkpoints/last: not saved, a rank ended or stalled meanwhile", GONE), resumes=True),
    Case("stop.dispatch@3:1", -9, (FORWARD, STOPPED), STOPPED_S, resumes=True),
    Case("stop.combine@3:0", -9, (FORWARD, STOPPED), STOPPED_S),
    Case("stop.backward@3:2", -9, (BACKWARD, STOPPED), STOPPED_S),
    Case("stop.reduce@3:1", -9, (r"step 3", STOPPED), STOPPED_S),
    Case("raise@3:1", 1, (FORWARD, BROKEN), arguments=("--experts", "brittle"), resumes=True),
    Case("leave@3:1", 0, (r"exchange of counts", r"rank {rank} \(pid \d+ on \S+\) (is gone|has ended)")),
    Case("config@0:1", 1, (r"on ranks \[{rank}\] differs from that on rank 0",)),
    Case("dtype@3:1", 1, (r"dtype=torch\.bfloat16 on rank {rank}",)),
    Case("width@3:1", 1, (r"rank {rank} refused its input",)),
    Case("count@3:1", 1, (r"capacity=6 on rank {rank}",), arguments=("--capacity_factor", "1.0")),
    Case(
        "disk.save@3:1",
        1,
        (r"/checkpoints/last: not saved, rank {rank} failed: .*_states\.pt: File too large",),
        resumes=True,
    ),
]


def run_to_the_end(pool: RankPool, folder: pathlib.Path, *arguments: str, num_ranks: int = NUM_RANKS) -> Losses:
    """The loss curve of a job that nothing ends before its time: its ranks may be those of other jobs before it."""
    pool.run(num_ranks, train.main, ["--folder", str(folder), *arguments], timeout_s=90)
    return Outcome(folder, (0,) * num_ranks, (), 0.0, num_ranks=num_ranks).losses()


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Losses]:
    """The loss curve of the job without a fault, by its arguments and ranks; run once each."""

    @functools.cache
    def run(arguments: tuple[str, ...], num_ranks: int = NUM_RANKS) -> Losses:
        losses = run_to_the_end(pool, tmp_path_factory.mktemp("undisturbed"), *arguments, num_ranks=num_ranks)
        assert list(losses) == list(range(6))
        return losses

    return run


# Others meet the same lane in another phase, or the same phase with another fault; a killed dispatch is launched, and a
# wrong width and dtype reach every rank in tests/engine/test_bad_input.py.
SLOW = ("kill.dispatch@3:1", "kill.combine@3:2", "kill.dispatch@3:2", "stop.combine@3:0", "stop.backward@3:2")
SLOW += ("dtype@3:1", "width@3:1")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case.fault in SLOW else ()) for case in CASES],
    ids=lambda case: case.fault,
)
def test_every_survivor_names_the_cause_in_time_and_what_was_trained_and_saved_stands(
    pool: RankPool, case: Case, tmp_path: pathlib.Path, undisturbed: Callable[[tuple[str, ...]], Losses]
) -> None:
    outcome = run_forked(tmp_path / "job", "--fault", case.fault, *case.arguments)
    assert outcome.exit_codes[case.rank] == case.code
    for rank in set(range(NUM_RANKS)) - {case.rank}:
        told = outcome.told(rank)
        for words in case.words:
            assert re.search(words.format(rank=case.rank), told), f"rank {rank} says nothing of {words}: {told}"
        assert outcome.exit_codes[rank] not in (0, -9), told
        assert outcome.ended_after_s(rank) < case.limit_s, told
    if case.resumes:
        check_resumed(pool, outcome, case.arguments, undisturbed(case.arguments))
    else:
        check_losses(outcome, undisturbed(case.arguments))


def check_losses(outcome: Outcome, expected: Losses) -> None:
    """The disturbed job was on the curve."""
    before = outcome.losses()
    assert before == {step: expected[step] for step in before}


def check_resumed(pool: RankPool, outcome: Outcome, arguments: tuple[str, ...], expected: Losses) -> None:
    """The disturbed job was on the curve, and from its last checkpoint it goes on on it, bit for bit.

    With copies of experts up to rounding: where they are follows from loads, which no checkpoint has.
    """
    check_losses(outcome, expected)
    saved = (outcome.folder / CHECKPOINTS).exists()
    for path in outcome.folder.glob("losses.*"):
        path.unlink()
    words = [*(["--resume"] if saved else []), *arguments]
    resumed = run_to_the_end(pool, outcome.folder, *words, num_ranks=outcome.num_ranks)
    first = 2 if saved else 0
    assert list(resumed) == list(range(first, 6))
    if arguments == REPLICAS:
        assert all(numbers(resumed[step]) == pytest.approx(numbers(expected[step]), rel=ROUNDING) for step in resumed)
    else:
        assert resumed == {step: expected[step] for step in resumed}


def numbers(bits: list[str]) -> list[float]:
    """The losses of a step's ranks."""
    return [struct.unpack(">f", bytes.fromhex(each))[0] for each in bits]


def test_one_weight_that_is_off_after_a_resume_is_seen_in_the_losses(
    pool: RankPool, tmp_path: pathlib.Path, undisturbed: Callable[[tuple[str, ...]], Losses]
) -> None:
    """The control of the comparison above: one weight on one rank, off by a hundredth in the first resumed step."""
    saved = run_to_the_end(pool, tmp_path, "--steps", "2")
    assert saved == {step: undisturbed(())[step] for step in range(2)}
    resumed = run_to_the_end(pool, tmp_path, "--resume", "--fault", "nudge@2:1")
    assert all(resumed[step] != undisturbed(())[step] for step in range(2, 6))
    for step in range(2, 6):
        assert numbers(resumed[step]) != pytest.approx(numbers(undisturbed(())[step]), rel=ROUNDING)
