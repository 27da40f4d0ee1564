"""The one-GPU check runs small on a CPU, without DeepSpeed: the layer at EP=16 equals the dense expert."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from ds_moe_ep.kernels.traffic import TRAFFIC
from ds_moe_ep.records.record import read_records
from tests.gpu.kernels import calls, from_torch, largest_difference
from tests.gpu.layers import Sizes, sizes
from tests.gpu.sections import SCHEDULES, GeluMLP, worst_error
from tests.kernels.interpreter import under_interpreter

WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None
from tests.gpu.one_gpu import main
sys.exit(main(["--small", "check", "sync", "speed", "--rounds", "2", "--out", sys.argv[1]]))
"""


def test_the_check_holds_on_a_cpu_and_leaves_records(tmp_path: Path) -> None:
    out = tmp_path / "one_gpu.jsonl"
    words = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 of 21 checks hold" in done.stdout
    found = {record.name: record for record in read_records(out)}
    for kind in ("GeluMLP", "SwiGLU"):
        for schedule in ("serial", "peers", "chunks"):
            for k in (1, 2):
                assert found[f"gpu.check.{kind}.{schedule}.k{k}"].value < 5e-6
    assert found["gpu.speed.none.serial.hidden"].value == 0
    assert found["gpu.speed.none.peers.traffic"].value > 0
    assert all(record.emulated for record in found.values())


def test_a_peer_whose_rows_are_lost_is_seen() -> None:
    of = sizes(small=True)
    assert worst_error(of, GeluMLP, SCHEDULES["peers"], 1, 0, 1) <= of.bound
    assert worst_error(of, GeluMLP, SCHEDULES["peers"], 1, 0, 1, "lost rows") > of.bound


@under_interpreter
def test_each_kernel_of_the_check_equals_plain_torch_where_triton_interprets() -> None:
    of = Sizes(20, 64, 32, torch.device("cpu"), torch.float32)
    found = {
        (name, k): from_torch(call) for k in (1, 2) for name, operation, call in calls(of, k) if TRAFFIC[operation]
    }
    assert len(found) == 2 * 12 + 2
    assert {at: difference for at, difference in found.items() if not difference < 1e-5} == {}
    numbers = torch.arange(4.0)
    assert largest_difference(numbers, numbers.roll(1)) == 1.0
    assert largest_difference(numbers / 0, numbers) == float("inf")
