"""The costs that pages tell in a sentence: the parts of the command that need no minutes."""

from __future__ import annotations

from dataclasses import replace

from tests.account.small_costs import PLANS, UNITS, line, measured


def test_the_checksums_of_a_small_file_are_timed_beside_its_load_and_told_with_their_unit() -> None:
    (plan,) = (plan for plan in PLANS if plan.what == "checksums")
    found = measured(replace(plan, rounds=3, size=2.0))
    assert {name: len(rounds) for name, rounds in found.items()} == {"checksums": 3, "torch.load": 3}
    assert all(seconds > 0 for rounds in found.values() for seconds in rounds)
    assert line("checksums", [1.0, 2.0, 4.0]) == "checksums  2 (1.5 to 3) s per GB, 3 rounds"
    assert {plan.what for plan in PLANS} <= set(UNITS)
