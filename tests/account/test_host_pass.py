"""The host's part of a pass in counts, which other work does not change: less than a third of the account's."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_moe_ep.moe.tuner import Choice
from ds_moe_ep.schedule import drift
from tests.account import host_pass
from tests.ranks import run_ranks

BEFORE = {"calls": (5_320, 4_376), "operations": (427, 449)}  # forward, backward: `python -m tests.account.host_time`

Counts = tuple[dict[str, list[int]], list[dict[str, list[int]]]]


def counted() -> dict[str, list[int]]:
    with host_pass.as_on_a_gpu():
        return host_pass.Passes("peers").counted()


def counted_beside_auto() -> list[dict[str, list[int]]]:
    """What a pass of the schedule counts: named, as the choice of "auto", and in a pass of it that is recorded."""
    choice = Choice(knobs={"schedule": "peers"}, time_to_serial=1, predicted_to_serial=1, serial_ms=1, raced={})
    found = []
    with host_pass.as_on_a_gpu():
        for schedule, sample_every in (("peers", 4), ("auto", 1_000_000), ("auto", 1)):
            drift.SAMPLE_EVERY = sample_every
            passes = host_pass.Passes(schedule)
            passes.layer.dispatcher.take_choice(choice)
            found.append(passes.counted())
    return found


def all_counted() -> Counts:
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    return counted(), counted_beside_auto()


@pytest.fixture(scope="module")
def counts() -> Counts:
    """Those of a pass, and of three beside each other. One rank that takes itself for one of sixteen."""
    return run_ranks(1, all_counted)[0]


MOST = {"calls": (0.27, 0.20), "operations": (0.20, 0.21)}  # of them


def test_a_pass_makes_less_than_a_third_of_the_calls_and_operations_of_the_account(counts: Counts) -> None:
    found, _ = counts
    shares = {what: [now / then for now, then in zip(found[what], BEFORE[what], strict=True)] for what in BEFORE}
    assert all(share < most for what in BEFORE for share, most in zip(shares[what], MOST[what], strict=True)), shares


AUTO_CALLS = 20  # of 1,500 or so: rows that came are compared with those before, passes are counted


def test_a_pass_of_what_auto_has_chosen_costs_what_the_same_schedule_costs_by_its_name(counts: Counts) -> None:
    _, (named, chosen, recorded) = counts
    assert chosen["operations"] == recorded["operations"] == named["operations"]
    assert chosen["calls"][1] == named["calls"][1]
    assert named["calls"][0] <= chosen["calls"][0] <= named["calls"][0] + AUTO_CALLS
    assert recorded["calls"][0] > chosen["calls"][0] + AUTO_CALLS, "the control: what a recorder adds is seen"


def test_what_is_counted_are_calls_and_operations() -> None:
    import torch

    with host_pass.Calls() as calls:
        abs(-1)
    with host_pass.Operations() as operations:
        torch.ones(2) + 1
    assert calls.number == pytest.approx(2, abs=1)
    assert operations.number == 2
