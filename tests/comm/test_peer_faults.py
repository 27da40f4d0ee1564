"""A rank that is killed, stopped or fails in mid-transfer: every survivor says who, where and why, in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.comm.disturbed import VICTIM, reports, two_passes
from tests.load_clock import without_load
from tests.ranks import RankError, RankPool

LIMIT_S = 2.5
SOON_S = 4.0  # to find a peer gone: 0.1 s on an idle machine, of which connections take next to nothing
MARGIN_S = 5.0  # beyond the limit: a survivor looks at the signs of life, which is quick where the peer is stopped

KNOBS: dict[str, dict[str, Any]] = {
    "pairwise": {"transport": "pairwise", "schedule": "peers", "timeout_s": LIMIT_S},
    "collective": {"transport": "collective", "schedule": "serial", "timeout_s": LIMIT_S},
}


def run_disturbed(pool: RankPool, folder: Path, kind: str, *case: str) -> dict[int, dict[str, Any]]:
    """The reports of three ranks with a transport."""
    pool.run(3, two_passes, str(folder), KNOBS[kind], *case, timeout_s=30)
    return reports(folder)


def survivors(pool: RankPool, folder: Path, kind: str, *case: str) -> dict[int, dict[str, Any]]:
    """The reports of the ranks that are left of three."""
    with pytest.raises(RankError) as error:
        run_disturbed(pool, folder, kind, *case)
    assert error.value.failures[VICTIM].message.startswith("exit code -9"), error.value
    found = reports(folder)
    assert sorted(found) == [VICTIM - 1, VICTIM + 1]
    return found


def check_named(found: dict[int, dict[str, Any]], phase: str, what: str, limit_s: float) -> None:
    """Each survivor's first error names the rank that is lost, and what became of it, in time."""
    for report in found.values():
        assert report["first"].startswith(f"PeerError: layers.2.moe: {phase} ")
        assert f"rank {VICTIM} (pid {report['pid']} on " in report["first"]
        assert f" is {what}, last seen in " in report["first"]
    assert without_load(report["took"] for report in found.values()) < limit_s, found


@pytest.mark.parametrize("kind", list(KNOBS))
def test_without_a_disturbance_both_passes_and_a_third_end_well(pool: RankPool, kind: str, tmp_path: Path) -> None:
    """The control of the tests below."""
    found = run_disturbed(pool, tmp_path, kind, "kill", "dispatch", "no such pass")
    assert [(report["first"], report["again"]) for report in found.values()] == [("", "")] * 3


@pytest.mark.parametrize("kind", list(KNOBS))
def test_an_exception_in_a_pass_reaches_every_rank_by_name_and_no_retry_reads_old_rows(
    pool: RankPool, kind: str, tmp_path: Path
) -> None:
    found = run_disturbed(pool, tmp_path, kind, "raise", "dispatch", "forward")
    assert found[VICTIM]["first"] == "ValueError: bad luck"
    assert without_load(report["took"] for report in found.values()) < SOON_S, found
    for rank, report in found.items():
        assert report["again"].startswith("PeerError: ") and "the lanes of ranks 0-2 are closed" in report["again"]
        assert "ValueError: bad luck" in report["again"], "the first failure is named"
        if rank != VICTIM:
            assert "first error: rank 1: ValueError: bad luck (in layers.2.moe: forward pass)" in report["first"]


@pytest.mark.parametrize("kind", list(KNOBS))
@pytest.mark.parametrize(("lane", "phase"), [("dispatch", "forward"), ("combine", "backward")])
def test_a_killed_rank_is_named_by_every_survivor_at_once(
    pool: RankPool, kind: str, lane: str, phase: str, tmp_path: Path
) -> None:
    found = survivors(pool, tmp_path, kind, "kill", lane, phase)
    check_named(found, phase, "gone", SOON_S)
    for report in found.values():
        assert "bytes expected" in report["first"]
        assert f"rank {VICTIM} did not answer rank" in report["first"] or kind == "pairwise"


@pytest.mark.parametrize("kind", list(KNOBS))
@pytest.mark.parametrize(("lane", "phase"), [("dispatch", "forward"), ("combine", "backward")])
def test_a_stopped_rank_is_named_by_every_survivor_at_the_limit(
    pool: RankPool, kind: str, lane: str, phase: str, tmp_path: Path
) -> None:
    found = survivors(pool, tmp_path, kind, "stop", lane, phase)
    check_named(found, phase, "stopped", LIMIT_S + MARGIN_S)
    assert any(f"within {LIMIT_S:g} s" in report["first"] for report in found.values())
    assert any("moe_ep.timeout_s" in report["first"] for report in found.values())
