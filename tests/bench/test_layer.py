"""The layer benchmark from the command line: two ranks, few rounds; what it prints and leaves on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_moe_ep.records.record import Record, read_records

COMMAND = [sys.executable, "-m", "ds_moe_ep.bench.layer", "--ranks", "2", "--cases", "k1_skewed", "--warm-ups", "1"]


def records_by_name(path: Path) -> dict[str, Record]:
    return {record.name: record for record in read_records(path)}


def is_alive(process_group: int) -> bool:
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_short_run_leaves_records_of_time_bytes_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "layer.jsonl"
    done = subprocess.run([*COMMAND, "--rounds", "3", "--out", str(out)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| k1_skewed | overlapped |" in done.stdout
    found = records_by_name(out)
    for name in ("native", "serial", "overlapped"):
        for what in ("time", "bytes", "peak"):
            assert found[f"layer.k1_skewed.{name}.{what}"].value > 0
    # Half of a rank's 1,024 rows of 1 KiB, about, leave it in each of 4 transfers; native pads 16 experts to 320.
    assert found["layer.k1_skewed.native.bytes"].value == 4 * 8 * 320 * 1024
    assert found["layer.k1_skewed.serial.bytes"].value < 0.3 * found["layer.k1_skewed.native.bytes"].value
    assert found["layer.k1_skewed.serial.difference"].value < 1e-5


@pytest.mark.slow
def test_ctrl_c_ends_every_rank_and_leaves_what_was_measured(tmp_path: Path) -> None:
    out, log = tmp_path / "layer.jsonl", tmp_path / "log"
    command = [*COMMAND, "--rounds", "100000", "--sides", "native", "matmul", "--out", str(out)]
    with (
        log.open("w") as lines,
        subprocess.Popen(
            command,
            stdout=lines,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Under a shell's `&` SIGINT is ignored and stays so: the default must be asked for.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process,
    ):
        # The bytes are on disk when the timing starts; a few rounds take a second or two.
        wait_until(lambda: out.exists() and ".bytes" in out.read_text(), 200)
        time.sleep(8)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert records_by_name(out)["layer.k1_skewed.native.time"].n >= 1
    wait_until(lambda: not is_alive(process.pid), 30)
