"""A rank that is killed, stopped or fails in mid-transfer: every survivor says who, where and why, in bounded time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.comm.disturbed import VICTIM, reports, two_passes
from tests.ranks import RankError, RankPool

LIMIT_S = 2.5
SOON_S = 4.0  # to find a peer gone: 0.1 s on an idle machine, of which connections take next to nothing
MARGIN_S = 5.0  # beyond the limit: a survivor looks at the signs of life, which is quick where the peer is stopped

KNOBS: dict[str, dict[str, Any]] = {  # of each three ranks
    "pairwise": {"transport": "pairwise", "schedule": "peers", "timeout_s": LIMIT_S},
    "collective": {"transport": "collective", "schedule": "serial", "timeout_s": LIMIT_S},
}
VICTIMS = {kind: 3 * index + VICTIM for index, kind in enumerate(KNOBS)}


def run_disturbed(pool: RankPool, folder: Path, kinds: Iterable[str], *case: str) -> dict[int, dict[str, Any]]:
    """The reports by rank, of three ranks for each transport."""
    knobs = [KNOBS[kind] for kind in kinds]
    pool.run(3 * len(knobs), two_passes, str(folder), knobs, *case, timeout_s=30)
    return reports(folder)


def survivors(pool: RankPool, folder: Path, *case: str) -> Iterator[tuple[str, int, dict[int, dict[str, Any]]]]:
    """The transport of three ranks, which of them is lost, and the reports of the others."""
    with pytest.raises(RankError) as error:
        run_disturbed(pool, folder, KNOBS, *case)
    for index, (kind, victim) in enumerate(VICTIMS.items()):
        assert error.value.failures[victim].message.startswith("exit code -9"), error.value
        its = {rank: report for rank, report in reports(folder).items() if rank // 3 == index}
        assert sorted(its) == [victim - 1, victim + 1]
        yield kind, victim, its


def test_without_a_disturbance_both_passes_and_a_third_end_well(pool: RankPool, tmp_path: Path) -> None:
    """The control of the tests below."""
    found = run_disturbed(pool, tmp_path, KNOBS, "kill", "dispatch", "no such pass")
    assert [(report["first"], report["again"]) for report in found.values()] == [("", "")] * 6


@pytest.mark.parametrize("kind", list(KNOBS))
def test_an_exception_in_a_pass_reaches_every_rank_by_name_and_no_retry_reads_old_rows(
    pool: RankPool, kind: str, tmp_path: Path
) -> None:
    found = run_disturbed(pool, tmp_path, [kind], "raise", "dispatch", "forward")
    assert found[VICTIM]["first"] == "ValueError: bad luck"
    for rank, report in found.items():
        assert report["took_s"] < SOON_S
        assert report["again"].startswith("PeerError: ") and "the lanes of ranks 0-2 are closed" in report["again"]
        assert "ValueError: bad luck" in report["again"], "the first failure is named"
        if rank != VICTIM:
            assert "first error: rank 1: ValueError: bad luck (in layers.2.moe: forward pass)" in report["first"]


@pytest.mark.parametrize(("lane", "phase"), [("dispatch", "forward"), ("combine", "backward")])
def test_a_killed_rank_is_named_by_every_survivor_at_once(
    pool: RankPool, lane: str, phase: str, tmp_path: Path
) -> None:
    for kind, victim, its in survivors(pool, tmp_path, "kill", lane, phase):
        for report in its.values():
            assert report["first"].startswith(f"PeerError: layers.2.moe: {phase} ")
            assert "bytes expected" in report["first"]
            assert f"rank {victim} did not answer rank" in report["first"] or kind == "pairwise"
            assert f"rank {victim} (pid {report['pid']} on " in report["first"]
            assert " is gone, last seen in " in report["first"]
            assert report["took_s"] < SOON_S


@pytest.mark.parametrize(("lane", "phase"), [("dispatch", "forward"), ("combine", "backward")])
def test_a_stopped_rank_is_named_by_every_survivor_at_the_limit(
    pool: RankPool, lane: str, phase: str, tmp_path: Path
) -> None:
    for _, victim, its in survivors(pool, tmp_path, "stop", lane, phase):
        for report in its.values():
            assert report["first"].startswith(f"PeerError: layers.2.moe: {phase} ")
            assert f"rank {victim} (pid {report['pid']} on " in report["first"]
            assert " is stopped, last seen in " in report["first"]
            assert report["took_s"] < LIMIT_S + MARGIN_S
        assert any(f"within {LIMIT_S:g} s" in report["first"] for report in its.values())
        assert any("moe_ep.timeout_s" in report["first"] for report in its.values())
