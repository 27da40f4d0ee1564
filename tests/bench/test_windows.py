"""Windows of a layer on unequal loads: rows that each rank's device works on, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch.distributed as dist

from ds_moe_ep.bench.candidates.cases import LayerCase
from ds_moe_ep.bench.candidates.layers import BIAS, NO_REMEDY, REPLICAS, LayerSetup, build
from ds_moe_ep.bench.overlap.windows import LayerWindow, WindowedLoad, run_window
from ds_moe_ep.comm.group_transport import GroupTransport
from tests.ranks import RankPool

WORLD, MICRO_BATCHES, WINDOWS = 4, 2, 3
CASE = LayerCase(name="windows", top_k=1, load="even", hidden_size=32, width=16, num_experts=WORLD, num_tokens=64)
CANDIDATES = (NO_REMEDY, BIAS, REPLICAS)


def counted(kinds: Sequence[str]) -> list[str]:
    """A list that takes the kind of each small exchange from now on."""
    calls: list[str] = []

    def wrap(kind: str, original: Any) -> None:
        setattr(GroupTransport, kind, lambda *args, **kwargs: [calls.append(kind), original(*args, **kwargs)][1])

    for kind in kinds:
        wrap(kind, getattr(GroupTransport, kind))
    return calls


def rows_worked_on() -> tuple[dict[str, list[float]], dict[str, list[dict[str, int]]]]:
    """Rows per micro-batch of this rank's device over its tokens, by candidate and workload, for each window.

    Beside them the small exchanges of each window.
    """
    rank, found, exchanges = dist.get_rank(), dict[str, list[float]](), dict[str, list[dict[str, int]]]()
    calls = counted(("consult", "exchange_counts", "sum"))
    for name in CANDIDATES:
        for workload in ("W0", "W1"):
            candidate = build(name, LayerSetup(case=CASE, rank=rank, num_ranks=WORLD, row_us=1.0))
            device, window = candidate.layer.deepspeed_moe.experts.device, LayerWindow(MICRO_BATCHES)
            busy_s, its_exchanges = [device.busy_s], exchanges.setdefault(f"{name} {workload}", [])
            for index in range(WINDOWS):
                candidate.prepare()
                batches = WindowedLoad(workload, MICRO_BATCHES).batches(CASE, rank, WORLD, index)
                calls.clear()
                run_window(candidate, batches, window)
                its_exchanges.append(Counter(calls))
                busy_s.append(device.busy_s)
            each_us = 3 * MICRO_BATCHES * CASE.num_tokens  # a row works once forward and twice backward
            found[f"{name} {workload}"] = [1e6 * (after - before) / each_us for before, after in pairwise(busy_s)]
    return found, exchanges


def test_replicas_level_a_hot_expert_that_fills_its_rank_without_them_and_under_three_steps_of_a_bias(
    pool: RankPool,
) -> None:
    by_rank = pool.run(WORLD, rows_worked_on)
    found = [rows for rows, _ in by_rank]
    fullest = {name: [max(rank[name][window] for rank in found) for window in range(WINDOWS)] for name in found[0]}
    for name in CANDIDATES:
        assert fullest[f"{name} W0"] == pytest.approx([1.0] * WINDOWS)
    assert fullest[f"{NO_REMEDY} W1"] == pytest.approx([4.0] * WINDOWS)
    assert fullest[f"{BIAS} W1"] == pytest.approx([4.0] * WINDOWS)
    assert fullest[f"{REPLICAS} W1"] == pytest.approx([1.0] * WINDOWS)
    per_pass = 2 * MICRO_BATCHES  # forward and backward
    for _, exchanges in by_rank:
        assert exchanges[f"{NO_REMEDY} W0"] == [{"consult": per_pass}] * WINDOWS
        assert exchanges[f"{REPLICAS} W0"] == exchanges[f"{NO_REMEDY} W0"], "without copies"
        # Placements and sums are compared where copies are in use; the first window's are made in its first pass.
        assert exchanges[f"{REPLICAS} W1"][1:] == [{"consult": per_pass + 2}] * (WINDOWS - 1)
