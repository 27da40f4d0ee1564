"""The shaped test bed: real namespaces, real links, real gloo traffic; skipped by name where there is no root."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_moe_ep.bench import testbed as command
from ds_moe_ep.bench.testbed import TestBed, enter, open_testbed, parse_rate, rank_environment, why_not
from ds_moe_ep.errors import EngineError
from tests.moe.layer_cases import LayerCase, case_data
from tests.moe.layer_runs import Links, build_layer, config, forward_backward, run_case, torus_for
from tests.moe.test_schedules import differences, serial
from tests.ranks import run_ranks

NODES, RANKS_PER_NODE, PORT = 4, 4, 29500
needs_root = pytest.mark.skipif(why_not() is not None, reason=f"no test bed: {why_not()}")


@needs_root
def test_a_link_has_its_rate_and_loses_nothing() -> None:
    num_bytes, rate_mbit = 2_000_000, 40
    for _ in range(5):  # a busy machine may keep the receiver waiting for a processor
        with open_testbed(2, rate_mbit) as testbed:
            before = testbed.sent_bytes(0)
            seconds = run_ranks(2, send_bytes, testbed, num_bytes, process_group=False)[1]
            sent = testbed.sent_bytes(0) - before
        assert num_bytes < sent < 1.15 * num_bytes, "headers and nothing sent again"
        of_rate = seconds * rate_mbit * 1e6 / 8 / num_bytes
        assert of_rate > 0.9
        if of_rate < 1.5:
            break
    assert of_rate < 1.5


def send_bytes(testbed: TestBed, num_bytes: int) -> float:
    """Seconds that rank 1, on a node of its own, waits for what rank 0 sends."""
    rank = int(os.environ["RANK"])
    enter(testbed.nodes[rank])
    if rank == 0:
        with socket.create_server((testbed.address(0), PORT)) as server:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"x" * num_bytes)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        return 0.0
    with connected(testbed.address(0)) as connection:
        start, received = time.perf_counter(), 0
        while chunk := connection.recv(1 << 20):
            received += len(chunk)
        assert received == num_bytes
        return time.perf_counter() - start


def connected(address: str) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection((address, PORT), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError(f"nobody listens at {address}")


def in_testbed(testbed: TestBed) -> None:
    """Joins the world inside the namespace of this rank's node."""
    rank = int(os.environ["RANK"])
    enter(testbed.nodes[rank // RANKS_PER_NODE])
    os.environ.update(rank_environment(testbed, rank, RANKS_PER_NODE, PORT))
    dist.init_process_group("gloo", init_method="env://")


CASE = LayerCase(
    name="sixteen ranks",
    config=config(num_experts=16, ep_size=16, top_k=2, node_size=RANKS_PER_NODE, bit_equal=True),
    rows=(40, 17, 0, 33, 40, 40, 1, 40, 40, 25, 40, 40, 3, 40, 40, 40),
    shared=True,
)
SCHEDULES: list[dict[str, object]] = [
    {"schedule": "peers"},
    {"schedule": "peers", "row_cuts": 2},
    {"schedule": "peers", "peer_group_size": 3, "depth": 1},
    {"schedule": "chunks", "chunks": 4},
]


def compare_in_testbed(testbed: TestBed, schedules: Sequence[dict[str, object]]) -> tuple[list[str], list[str]]:
    """Differences from serial under each schedule; and the control, in which one input differs by one bit."""
    in_testbed(testbed)
    links, wrong = Links(), []
    expected = run_case(serial(CASE), links.of(CASE))
    for knobs in schedules:
        names = differences(run_case(CASE.with_config(**knobs), links.of(CASE)), expected)
        wrong += [f"{knobs}: {names}"] if names else []
    layer = build_layer(CASE, data := case_data(CASE))
    layer.connect(links.of(CASE), torus_for(CASE))
    data.inputs[0][0, 0] += 2**-20
    control = differences(forward_backward(layer, CASE, data), expected)
    dist.barrier()
    dist.destroy_process_group()
    return wrong, control


@needs_root
@pytest.mark.parametrize("schedules", [SCHEDULES, pytest.param([{"schedule": "auto"}], marks=pytest.mark.slow)])
def test_overlapped_equals_serial_bit_for_bit_at_sixteen_ranks_on_four_nodes(
    schedules: list[dict[str, object]],
) -> None:
    with open_testbed(NODES, rate_mbit=200) as testbed:
        before = [testbed.sent_bytes(node) for node in range(NODES)]
        results = run_ranks(16, compare_in_testbed, testbed, schedules, process_group=False, timeout_s=150)
        sent = [testbed.sent_bytes(node) - b for node, b in enumerate(before)]
    assert [wrong for wrong, _ in results] == [[]] * 16
    assert "y" in results[0][1], "the comparison sees one changed bit"
    assert min(sent) > 100_000, "rows went over every node's link"


@needs_root
def test_the_same_command_runs_once_a_rank_and_a_failure_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(os.environ['MASTER_ADDR'])\n"
        "if sys.argv[1] == 'fail' and os.environ['RANK'] == '1': sys.exit(7)\n"
        "if sys.argv[1] == 'fail': time.sleep(100)\n"
        f"if sys.argv[1] == 'fail': pathlib.Path({str(tmp_path)!r}, 'slept').touch()\n"
    )
    words = ["--nodes", "2", "--ranks", "2", "--", sys.executable, str(script)]
    assert command.main([*words, "pass"]) == 0
    assert sorted(path.name for path in tmp_path.glob("[0-9]")) == ["0", "1", "2", "3"]
    assert command.main([*words, "fail"]) == 7
    assert not (tmp_path / "slept").exists(), "nobody was waited for"


@needs_root
def test_nothing_is_left_behind_when_the_process_is_killed() -> None:
    script = (
        "from ds_moe_ep.bench.testbed import open_testbed\n"
        "with open_testbed(2, 100) as testbed:\n"
        "    print(testbed.hub, *testbed.nodes, flush=True)\n"
        "    import time; time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    namespaces = [Path(path) for path in process.stdout.readline().split()]
    assert len(namespaces) == 3 and all(path.exists() for path in namespaces)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while any(path.exists() for path in namespaces) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(path.exists() for path in namespaces)


def test_without_what_it_needs_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(command.shutil, "which", lambda tool: f"/bin/{tool}")
    assert "root" in (why_not() or "")
    with pytest.raises(EngineError, match=r"testbed\.nodes=2.*root"), open_testbed(2):
        pass
    assert command.main(["--", "true"]) == 2
    assert "root" in capsys.readouterr().err
    monkeypatch.setattr(command.shutil, "which", lambda tool: None)
    assert "iproute2" in (why_not() or "")


def test_rates_are_read_as_tc_writes_them() -> None:
    assert [parse_rate(text) for text in ("100mbit", "2gbit", "64kbit", "none")] == [100, 2000, 0.064, None]
    with pytest.raises(Exception, match="100mbit"):
        parse_rate("fast")
