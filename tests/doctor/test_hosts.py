"""Verdicts on the hosts of a hostfile, for hosts that the tests do not have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.doctor.hosts import HostAnswer, HostsFacts, judge_hosts, read_hostfile
from ds_moe_ep.errors import ConfigError

VERSIONS = {"Python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "ds_moe_ep": "0.1.0"}
ONE = HostAnswer(name="node1", own_name="node1", versions=VERSIONS)
TWO = HostAnswer(name="node2", own_name="node2", versions=VERSIONS)
GOOD = HostsFacts(
    path="hosts",
    slots={"node1": 4, "node2": 4},
    answers=(ONE, TWO),
    launchers=frozenset({"pdsh"}),
    silence_s=45,
    environment={"OMP_NUM_THREADS": "1", "HOME": "/"},
    env_files={"./.deepspeed_env": ("OMP_NUM_THREADS=1",)},
)
OLD = replace(TWO, versions={**VERSIONS, "torch": "2.11.0", "ds_moe_ep": None})


def test_hosts_that_are_alike_and_answer_are_ok() -> None:
    found = {verdict.name: verdict for verdict in judge_hosts(GOOD)}
    assert found.keys() == {"hostfile", "launcher", "ssh"}
    assert {verdict.status for verdict in found.values()} == {"ok"}
    assert found["hostfile"].found == "hosts: 8 ranks on 2 hosts"


@pytest.mark.parametrize(
    ("facts", "name", "status", "text", "fix"),
    [
        (replace(GOOD, launchers=frozenset()), "launcher", "problem", "neither pdsh", "install pdsh"),
        (replace(GOOD, launchers=frozenset({"openmpi"})), "launcher", "note", "no pdsh", "--launcher openmpi"),
        (
            replace(GOOD, answers=(ONE, HostAnswer(name="node2", error="exit code 255: Permission denied"))),
            "ssh", "problem", "node2: exit code 255: Permission denied", "`ssh node2 true`",
        ),
        (replace(GOOD, answers=(ONE, OLD)), "versions", "problem", "torch: 2.13.0 on node1, 2.11.0 on node2", "one"),
        (replace(GOOD, answers=(ONE, OLD)), "versions", "problem", "ds_moe_ep: 0.1.0 on node1, none on node2", "one"),
        (
            replace(GOOD, answers=(ONE, replace(TWO, own_name="node1"))),
            "host names", "warning", "node1: several hosts have this name", "moe_ep.node_size",
        ),
        (replace(GOOD, silence_s=0), "lost hosts", "warning", "waits without end for a host", "ServerAliveInterval=15"),
        (replace(GOOD, silence_s=900), "lost hosts", "warning", "waits for 900 s for a host", "ServerAliveInterval=15"),
        (
            replace(GOOD, env_files={}),
            "environment", "warning", "OMP_NUM_THREADS: set here", "./.deepspeed_env, one per line: OMP_NUM_THREADS=1",
        ),
        (
            replace(GOOD, env_files={"./.deepspeed_env": ("OMP_NUM_THREADS=1", "", "# mine")}),
            ".deepspeed_env", "problem", "line 2 is '', which ends the launcher", "no empty lines",
        ),
    ],
)  # fmt: skip
def test_each_thing_that_the_launcher_would_stumble_over_is_named_with_a_fix(
    facts: HostsFacts, name: str, status: str, text: str, fix: str
) -> None:
    found = [verdict for verdict in judge_hosts(facts) if verdict.name == name and text in verdict.found]
    assert [verdict.status for verdict in found] == [status]
    assert fix in found[0].fix


def test_open_mpi_alone_needs_no_sign_of_life_from_ssh() -> None:
    facts = replace(GOOD, launchers=frozenset({"openmpi"}), silence_s=0)
    assert "lost hosts" not in {verdict.name for verdict in judge_hosts(facts)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node1 slots=4\nnode1 slots=2\n", "line 2 has node1 again"),
        ("node1\n", "line 1 is 'node1'; write `node1 slots=4`"),
        ("# all\nnode1 slots=four\n", "line 2 is 'node1 slots=four'"),
    ],
)
def test_a_hostfile_that_no_launcher_takes_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=r"hostfile='.*hosts': "):
        read_hostfile(str(tmp_path / "hosts"))
    assert main(["doctor", "--no-links", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert message in capsys.readouterr().err


def test_the_hostfile_of_the_examples_reads_as_four_hosts_of_four_ranks() -> None:
    path = Path(__file__).parents[2] / "examples" / "hostfile"
    assert read_hostfile(str(path)) == {f"node{number}": 4 for number in range(1, 5)}
