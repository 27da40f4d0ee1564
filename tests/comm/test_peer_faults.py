"""A rank that is killed, stopped or fails in mid-transfer: every survivor says who, where and why, in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.comm.disturbed import VICTIM, reports, two_passes
from tests.ranks import RankError, run_ranks

LIMIT_S = 2.5
SOON_S = 4.0  # to find a peer gone: 0.1 s on an idle machine, of which connections take next to nothing
MARGIN_S = 5.0  # beyond the limit: a survivor looks at the signs of life, which is quick where the peer is stopped

KNOBS: dict[str, dict[str, Any]] = {
    "pairwise": {"transport": "pairwise", "schedule": "peers", "timeout_s": LIMIT_S},
    "collective": {"transport": "collective", "schedule": "serial", "timeout_s": LIMIT_S},
}


def survivors(folder: Path, *case: Any) -> dict[int, dict[str, Any]]:
    """The reports of the ranks that are left of three."""
    with pytest.raises(RankError, match=rf"rank {VICTIM}: Died: exit code -9"):
        run_ranks(3, two_passes, str(folder), *case, timeout_s=30)
    found = reports(folder)
    assert sorted(found) == [0, 2]
    return found


@pytest.mark.parametrize("kind", list(KNOBS))
@pytest.mark.parametrize(("lane", "phase"), [("dispatch", "forward"), ("combine", "backward")])
def test_a_killed_rank_is_named_by_every_survivor_at_once(kind: str, lane: str, phase: str, tmp_path: Path) -> None:
    for report in survivors(tmp_path, KNOBS[kind], "kill", lane, phase).values():
        assert report["first"].startswith(f"PeerError: layers.2.moe: {phase} ")
        assert "bytes expected" in report["first"]
        assert f"rank {VICTIM} did not answer rank" in report["first"] or kind == "pairwise"
        assert f"rank {VICTIM} (pid {report['pid']} on " in report["first"]
        assert " is gone, last seen in " in report["first"]
        assert report["took_s"] < SOON_S


@pytest.mark.parametrize("kind", list(KNOBS))
@pytest.mark.parametrize(("lane", "phase"), [("dispatch", "forward"), ("combine", "backward")])
def test_a_stopped_rank_is_named_by_every_survivor_at_the_limit(
    kind: str, lane: str, phase: str, tmp_path: Path
) -> None:
    found = survivors(tmp_path, KNOBS[kind], "stop", lane, phase)
    for report in found.values():
        assert report["first"].startswith(f"PeerError: layers.2.moe: {phase} ")
        assert f"rank {VICTIM} (pid {report['pid']} on " in report["first"]
        assert " is stopped, last seen in " in report["first"]
        assert report["took_s"] < LIMIT_S + MARGIN_S
    assert any(f"within {LIMIT_S:g} s" in report["first"] for report in found.values())
    assert any("moe_ep.timeout_s" in report["first"] for report in found.values())


@pytest.mark.parametrize("kind", list(KNOBS))
def test_an_exception_in_a_pass_reaches_every_rank_by_name_and_no_retry_reads_old_rows(
    kind: str, tmp_path: Path
) -> None:
    run_ranks(3, two_passes, str(tmp_path), KNOBS[kind], "raise", "dispatch", "forward", timeout_s=30)
    found = reports(tmp_path)
    assert found[VICTIM]["first"] == "ValueError: bad luck"
    for rank, report in found.items():
        assert report["took_s"] < SOON_S
        assert report["again"].startswith("PeerError: ") and "the lanes of ranks 0-2 are closed" in report["again"]
        assert "ValueError: bad luck" in report["again"], "the first failure is named"
        if rank != VICTIM:
            assert "first error: rank 1: ValueError: bad luck (in layers.2.moe: forward pass)" in report["first"]


def test_without_a_disturbance_both_passes_and_a_third_end_well(tmp_path: Path) -> None:
    """The control of the tests above."""
    run_ranks(3, two_passes, str(tmp_path), KNOBS["pairwise"], "kill", "dispatch", "no such pass", timeout_s=30)
    assert [(report["first"], report["again"]) for report in reports(tmp_path).values()] == [("", "")] * 3
