"""`verify` in every job of the layouts' covering design: no finding in a sound engine, and a fault of each is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine.layouts.layout_runs import LAYOUT_RANKS
from tests.engine.layouts.test_layout_cover import covering, job_of
from tests.ranks import run_ranks
from tests.verification.layout_mutants import doubled_weight
from tests.verification.layouts import RanksLayout, cover_layout
from tests.verification.mutants import Mutant
from tests.verification.test_verify import Examined, check_named, check_sound, examined

PARTS = 6  # each within the time of a test on a busy machine


def layouts_of(part: int) -> list[RanksLayout]:
    names = ("tp_size", "pp_size", "sp_size", "ep_size", "stage", "precision", "recompute", "top_k")
    jobs = [job_of(settings) for settings in covering()][part::PARTS]
    more = ("accumulation", "tokens")
    return [cover_layout(**{name: getattr(job, name) for name in (*names, *more)}) for job in jobs]


def faults_of(layouts: Sequence[RanksLayout]) -> list[list[Mutant]]:
    told = "gradient is not the dense model's"
    return [[Mutant("doubled", layout, doubled_weight, "gradients", told)] for layout in layouts]


def examine(part: int) -> list[Examined]:
    layouts = layouts_of(part)
    return examined(layouts, faults_of(layouts))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_layouts_has_no_finding_and_a_doubled_gradient_is_named(part: int) -> None:
    layouts: list[Any] = layouts_of(part)
    for rank, theirs in enumerate(run_ranks(LAYOUT_RANKS, examine, part, timeout_s=500)):
        for layout, faults, found in zip(layouts, faults_of(layouts), theirs, strict=True):
            check_sound(layout, found)
            if rank == 0:
                check_named(faults, found.of_faults[0])
