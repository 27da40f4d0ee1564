"""Answers to the page, and to programs: a folder of run logs as objects of JSON."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.live.folder import ReportPlace, RunFolder, SeenRun
from ds_moe_ep.live.lines import RunReport
from ds_moe_ep.live.load import LayerReport, fullest_over_mean

MAX_POINTS = 1000  # of a curve
MAX_COLUMNS = 240  # of a heat map over time
SILENT_S = 30.0  # without a line, and silent for SILENT_INTERVALS times the usual interval: the run may be gone
SILENT_INTERVALS = 5


def snapshot(folder: RunFolder, run: str | None = None) -> dict[str, Any]:
    """The state of a run, the last one unless `run` names another: its curves and its last report.

    Raises ConfigError for a run that is not there.
    """
    answer: dict[str, Any] = {
        "folder": folder.path.resolve().name,
        "state": "waiting",
        "runs": [_summary(name, folder.runs[name]) for name in sorted(folder.runs)],
        "skipped_lines": folder.num_skipped,
    }
    if not folder.runs:
        return answer
    name = max(folder.runs) if run is None else run
    chosen = run_of(folder, name)
    entries, now_s = chosen.entries, time.time()
    answer |= {
        "state": state_of(chosen, now_s),
        "silent_s": round(max(now_s - chosen.last_s, 0.0), 1),
        "run": name,
        "head": dataclasses.asdict(chosen.head),
        "num_reports": len(entries),
        "series": series_of(entries),
        "last": report_at(chosen, len(entries) - 1) if entries else None,
    }
    return answer


def run_of(folder: RunFolder, name: str) -> SeenRun:
    """The run of a name. Raises ConfigError where there is none."""
    if name not in folder.runs:
        raise ConfigError(
            f"run={name}: no such run in {folder.path}; take one of {', '.join(sorted(folder.runs)) or 'none'}"
        )
    return folder.runs[name]


def state_of(run: SeenRun, now_s: float) -> str:
    """`live`, `ended` in order, or `silent` for much longer than its reports were apart."""
    if run.is_ended:
        return "ended"
    times_s = [entry.figures["time_s"] or 0.0 for entry in run.entries[-20:]]
    apart_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else SILENT_S
    is_silent = now_s - run.last_s > max(SILENT_S, SILENT_INTERVALS * apart_s)
    return "silent" if is_silent else "live"


def series_of(entries: Sequence[ReportPlace]) -> dict[str, list[Any]]:
    """The curves, by name: at most MAX_POINTS points, the last one among them."""
    thinned = [entries[index] for index in thin(len(entries), MAX_POINTS)]
    names = list(thinned[0].figures) if thinned else []
    return {name: [entry.figures[name] for entry in thinned] for name in names}


def thin(number: int, most: int) -> list[int]:
    """At most `most` of the indices below a number, evenly spread, both ends among them."""
    if number <= most:
        return list(range(number))
    return [round(place * (number - 1) / (most - 1)) for place in range(most)]


def report_at(run: SeenRun, index: int) -> dict[str, Any]:
    """The report of an index with all that follows from its counts. Raises ConfigError where there is none."""
    report = run.entries[index].read() if 0 <= index < len(run.entries) else None
    if report is None:
        raise ConfigError(
            f"report={index}: the run has {len(run.entries)}, of which the oldest may have gone; ask for one"
        )
    return {"index": index, **described(report)}


def described(report: RunReport) -> dict[str, Any]:
    """A report as the page shows it."""
    layers = [_layer(layer) for layer in report.layers]
    by_rank = [sum(rows) for rows in zip(*(layer.rank_rows_R for layer in report.layers), strict=True)]
    return {
        **{field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "layers"},
        "p50": report.p50,
        "p95": report.p95,
        "rank_rows_R": by_rank,
        "rank_max_over_mean": fullest_over_mean(by_rank) if by_rank else None,
        "slowest": slowest_of(report),
        "layers": layers,
    }


def slowest_of(report: RunReport) -> dict[str, Any] | None:
    """The rank whose experts took longest in the step that the meter measured; None where none was measured."""
    times_ms = report.expert_ms_R
    if not times_ms or not max(times_ms):
        return None
    rank = times_ms.index(max(times_ms))
    return {
        "rank": rank,
        "expert_ms": times_ms[rank],
        "over_mean": fullest_over_mean(times_ms),
        "step": report.hidden_step,
    }


def layer_over_time(run: SeenRun, name: str) -> dict[str, Any]:
    """The experts' rows per pass of one layer, in at most MAX_COLUMNS reports. Raises ConfigError for another name."""
    if name not in (known := [layer.name for layer in run.head.layers]):
        raise ConfigError(f"layer={name}: the run has {', '.join(known)}; take one of them")
    columns = []
    for index in thin(len(run.entries), MAX_COLUMNS):
        report = run.entries[index].read()
        layer = next((layer for layer in report.layers if layer.name == name), None) if report else None
        if report is not None and layer is not None:
            rows_E = [layer.rows_per_pass(expert) for expert in range(len(layer.rows_E))]
            columns.append({"index": index, "step": report.step, "rows_E": rows_E})
    return {"layer": name, "columns": columns}


def _layer(layer: LayerReport) -> dict[str, Any]:
    return {
        **dataclasses.asdict(layer),
        "rows_per_pass_E": [layer.rows_per_pass(expert) for expert in range(len(layer.rows_E))],
        "share_E": layer.share_E,
        "max_over_mean": layer.max_over_mean,
        "dead_experts": layer.dead_experts,
        "entropy_bits": layer.entropy_bits,
        "most_entropy_bits": math.log2(len(layer.rows_E)),
        "dropped_percent": layer.dropped_percent,
        "num_replicas": layer.num_replicas,
    }


def _summary(name: str, run: SeenRun) -> dict[str, Any]:
    steps = [entry.figures["step"] for entry in run.entries]
    ends = {"first_step": steps[0], "last_step": steps[-1]} if steps else {"first_step": None, "last_step": None}
    return {"run": name, "started_s": run.head.time_s, "num_reports": len(steps), **ends}
