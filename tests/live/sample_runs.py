"""Runs whose figures are known, for tests of what reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ds_moe_ep.live.lines import LayerShape, RunHead, RunReport
from ds_moe_ep.live.load import LayerReport, fullest_over_mean
from ds_moe_ep.live.run_log import RunLog

START_S = 1_795_900_000.0
NAMES = ("layers.0.moe", "layers.1.moe")
ROWS_E = (40, 10, 0, 30)  # of the first layer at the first report: two experts per rank, one of them dead


def head(run: str = "20261128-120000-0a0a", **changes: Any) -> RunHead:
    layers = tuple(LayerShape(name=name, num_experts=4, ep_size=2, top_k=1) for name in NAMES)
    made = RunHead(run=run, time_s=START_S, version="0.1.0", hosts_R=("here", "there"), layers=layers, every=10)
    return dataclasses.replace(made, **changes)


def layer(name: str, rows_E: tuple[int, ...] = ROWS_E, **changes: Any) -> LayerReport:
    """A layer whose two ranks compute the rows of their own experts, in two passes."""
    half = len(rows_E) // 2
    rank_rows_R = (sum(rows_E[:half]) / 2, sum(rows_E[half:]) / 2)
    ratio = fullest_over_mean(rank_rows_R)
    made = LayerReport(
        name=name,
        num_passes=2,
        rows_E=rows_E,
        dropped_E=(0,) * len(rows_E),
        rank_rows_R=rank_rows_R,
        p50=ratio,
        p95=ratio + 0.5,
    )
    return dataclasses.replace(made, **changes)


def report(index: int = 0, **changes: Any) -> RunReport:
    """The report of an index, every 10 steps and 5 seconds."""
    made = RunReport(
        step=10 * (index + 1),
        time_s=START_S + 5 * (index + 1),
        loss=2.5 - index / 100,
        tokens_per_s=1000.0 + index,
        step_ms=500.0,
        hidden_step=10,
        hidden_percent=92.5,
        control_percent=0.5,
        expert_ms_R=(8.0, 12.0),
        layers=(layer(NAMES[0]), layer(NAMES[1], (20 + index, 20, 20, 20))),
    )
    return dataclasses.replace(made, **changes)


def write_run(folder: Path, num_reports: int = 3, run: str = "20261128-120000-0a0a", ends: bool = True) -> RunLog:
    """A run's log of some reports."""
    log = RunLog(folder, head(run))
    for index in range(num_reports):
        log.write(report(index))
    if ends:
        log.end()
    return log
