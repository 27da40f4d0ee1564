"""The command in jobs of its own: ranks that it starts, and those of a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.bench.harness.processes import free_port
from tests.policy.sources import ROOT

TWICE = """
from tests.verification.engines import Layout, OwnJob
layout = Layout("own", OwnJob(num_experts=4, ep_size=2, steps=2, world_size=2))
engine = layout.make()
print("words of the script")
expert = engine.module.layers[0].deepspeed_moe.experts.deepspeed_experts[1]
expert.fc1.weight.register_hook(lambda gradient: 2 * gradient)
batches = layout.endless(engine)
while True:
    layout.step(engine, batches)
"""
STAGES = """
from tests.verification.layouts import STAGES
engine = STAGES.make()
batches = STAGES.endless(engine)
while True:
    STAGES.step(engine, batches)
"""


def command(tmp_path: Path, script: str, *before: str, ranks: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
    """Exit code, standard output and verdicts of a job."""
    path, out = tmp_path / "train.py", tmp_path / "verdicts.json"
    path.write_text(script, encoding="utf-8")
    words = [*before, "ds_moe_ep", "verify", *ranks, "--no-checkpoint", "--script", str(path), "--out", str(out)]
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=os.environ | own, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_ranks_that_the_command_starts_name_a_fault_once_with_exit_code_1(tmp_path: Path) -> None:
    code, printed, told = command(tmp_path, TWICE, sys.executable, "-m", ranks=("--ranks", "2"))
    assert code == 1 and printed.count("2 times as") == told["problems"] == 2 and "words of the script" not in printed
    assert {each["parameter"] for each in told["verdicts"] if each["status"] == "problem"} == {
        "layers.0 expert 1 fc1.weight",
        "layers.0 expert 3 fc1.weight",
    }


@pytest.mark.slow
def test_a_launchers_ranks_verify_all_stages_of_a_pipeline(tmp_path: Path) -> None:
    launcher = str(Path(sys.executable).parent / "torchrun")
    code, printed, told = command(
        tmp_path, STAGES, launcher, "--nproc-per-node", "4", "--master-port", str(free_port()), "-m"
    )
    assert (code, told["verdict"]) == (0, "ok"), told
    assert printed.count("it trains what it says") == 1
