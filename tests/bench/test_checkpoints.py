"""The benchmark of checkpoints: its ratios, its refusals, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_moe_ep.bench.checkpoints.command import CheckpointBenchmark, CheckpointOptions, main
from ds_moe_ep.bench.checkpoints.ranks import ACTIONS, EXPORT, LOAD
from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.errors import ConfigError


def test_a_ratio_is_of_an_action_and_its_own_plain_side_in_the_same_round() -> None:
    bench = CheckpointBenchmark(CheckpointOptions())
    found = Collector(None, bench.metric, bench.derive)
    for plain_ms, export_ms in ((200.0, 300.0), (400.0, 400.0), (200.0, 1000.0)):
        for action, ms, plain in ((LOAD, 7.0, 1.0), (EXPORT, export_ms, plain_ms)):
            of = f"checkpoints.{action}"
            found.add(Finding(samples={f"{of}.time": (ms,), f"{of}.plain": (plain,), f"{of}.peak": (1.0,)}))
    values = {each.name: each.value for each in found.quantities()}
    assert values[f"checkpoints.{EXPORT}.ratio"] == 1.5  # of 1.5, 1 and 5
    assert values[f"checkpoints.{LOAD}.ratio"] == 7


def test_numbers_of_ranks_and_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bench\.ranks=3: the model has 8 experts"):
        CheckpointBenchmark(CheckpointOptions(ranks=3))
    with pytest.raises(ConfigError, match=r"--folder=.*: is no folder; make it first"):
        CheckpointBenchmark(CheckpointOptions(folder=tmp_path / "none"))


@pytest.mark.slow  # 20 s of processor time, most of it imports in fresh processes
@pytest.mark.timeout(300)
def test_a_small_run_measures_every_action_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    words = ["--ranks", "2", "--model-mb", "8", "--rounds", "2", "--folder", str(tmp_path), "--out", str(out)]
    assert main(words) == 0
    records = {record["name"]: record["value"] for record in map(json.loads, out.read_text().splitlines())}
    for action in ACTIONS:
        assert records[f"checkpoints.{action}.time"] > 0 and records[f"checkpoints.{action}.plain"] > 0
        assert records[f"checkpoints.{action}.ratio"] > 0
        assert records[f"checkpoints.{action}.bytes"] > 8e6
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
