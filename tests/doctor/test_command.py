"""`python -m ds_moe_ep doctor` on this machine: its lines, its exit codes, its JSON, and that it works inside a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.cli.main import main
from ds_moe_ep.doctor import command
from ds_moe_ep.doctor.variables import SPECIFIED
from ds_moe_ep.doctor.verdicts import GROUPS, STATUSES, Verdict, conclusion, print_verdicts, to_dict, worst
from tests.doctor.machines import CPU
from tests.policy.sources import ROOT
from tests.ranks import run_ranks

COMMAND = [sys.executable, "-m", "ds_moe_ep", "doctor"]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
CONFIG: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "moe_ep": {"num_experts": 4, "ep_size": 2, "node_size": 1, "model": "small"},
}


def write(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, **ENVIRONMENT},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_of_its_own_are_tried_and_every_group_has_lines(tmp_path: Path) -> None:
    with start(["--config", write(tmp_path, CONFIG), "--seconds", "0.5", "--json"]) as process:
        printed, errors = process.communicate(timeout=250)
    assert process.returncode == 0, printed + errors
    found = json.loads(printed)
    assert found["verdict"] != "problem"
    assert sum(found["counts"].values()) == len(found["verdicts"])
    lines = {(verdict["group"], verdict["name"]): verdict for verdict in found["verdicts"]}
    assert {group for group, _ in lines} == set(GROUPS)
    assert lines["packages", "DeepSpeed"]["found"] == "0.19.8, tested"
    assert {name for name in SPECIFIED if lines["environment", name]["applies"]} == set()
    assert "2 ranks, 4 experts per layer, ep_size 2" in lines["job", "ds_config"]["found"]
    assert lines["links", "ranks"]["found"].startswith("2 of 2 came up")
    assert lines["links", "far links"]["found"].startswith("1 pair: ")
    assert "no pair can be judged here" in lines["links", "pairs"]["found"]
    assert all(verdict["fix"] for verdict in found["verdicts"] if verdict["status"] in ("warning", "problem"))


def test_a_bad_config_exits_with_1_and_its_reason_and_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "gather", lambda: CPU)
    assert main(["doctor", "--config", write(tmp_path, {"moe_ep": {"epsize": 4}}), "--no-links"]) == 1
    printed = capsys.readouterr().out
    assert "moe_ep.epsize=4: unknown key" in printed
    assert "fix: did you mean 'ep_size'?" in printed
    assert "not tried: --no-links" in printed
    assert printed.startswith("1 problem")


def printed_in_a_job(arguments: list[str]) -> tuple[int, str]:
    """On a rank whose launcher has not started torch.distributed: the command's exit code and its output."""
    output = StringIO()
    with redirect_stdout(output), mock.patch.object(command, "gather", lambda: CPU):
        return main(["doctor", *arguments]), output.getvalue()


def test_in_a_job_the_jobs_ranks_are_tried_and_rank_0_prints() -> None:
    meeting = {"MASTER_PORT": str(free_port())}
    (first, printed), (second, silence) = run_ranks(
        2, printed_in_a_job, ["--seconds", "0.5"], env=meeting, process_group=False, timeout_s=200
    )
    assert (first, second) == (0, 0), printed
    assert silence == ""
    assert "2 of 2 came up" in printed
    assert "2 ranks on" in printed
    assert printed.startswith("ready")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "ConfigError: doctor.ranks=1: a link needs two ranks"),
        (["--seconds", "0"], "ConfigError: --seconds=0: give a number that is more than 0"),
        (["--wait", "-3"], "ConfigError: --wait=-3: give a number that is more than 0"),
    ],
)
def test_options_that_have_no_meaning_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_launchers_local_rank_is_taken_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--local_rank=3", "doctor", "--help"])
    assert left.value.code == 0
    assert "Prints the verdict, then problems and warnings with their fixes" in " ".join(
        capsys.readouterr().out.split()
    )


def printed(verdicts: list[Verdict], *, verbose: bool = False) -> list[str]:
    console = Console(width=80, record=True, file=StringIO())
    print_verdicts(verdicts, console, verbose=verbose)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


MIXED = [
    Verdict("packages", "apex", "note", "none", "build it"),
    Verdict("environment", "NCCL_IB_HCA", "ok", "not set", applies=False),
    Verdict("links", "topology", "ok", "fine"),
    Verdict("machine", "open files", "warning", "few", "more of them"),
    Verdict("machine", "memory", "problem", "full", "empty it"),
]


def test_the_verdict_comes_first_then_problems_then_warnings_with_their_fixes_then_the_rest() -> None:
    lines = printed(MIXED)
    assert lines[0] == "1 problem, 1 warning: it cannot run as it is"
    urgent, rest = "\n".join(lines[1:]).strip().split("\n\n")[:2]
    assert urgent.splitlines() == [
        "problem memory full",
        "fix: empty it",
        "warning open files few",
        "fix: more of them",
    ]
    assert rest.splitlines() == ["packages note apex none", "fix: build it", "links ok topology fine"]
    assert to_dict(MIXED)["counts"] == {"ok": 2, "note": 1, "warning": 1, "problem": 1}
    assert list(to_dict(MIXED)["counts"]) == list(STATUSES)


def test_what_does_not_matter_on_a_machine_is_counted_and_shown_on_demand_alone() -> None:
    assert not any("NCCL_IB_HCA" in line for line in printed(MIXED))
    assert printed(MIXED)[-1] == "1 check does not matter on this machine; --verbose shows all"
    assert "environment ok NCCL_IB_HCA not set" in printed(MIXED, verbose=True)
    assert "verbose" not in printed(MIXED, verbose=True)[-1]


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [([], "ready"), (MIXED[:3], "ready"), (MIXED[:4], "ready, 1 warning"), (2 * MIXED[:4], "ready, 2 warnings")],
)
def test_a_machine_without_a_problem_is_ready(verdicts: list[Verdict], told: str) -> None:
    assert conclusion(verdicts) == told
    assert worst(verdicts) in ("ok", "note", "warning")


def test_a_verdict_that_is_not_well_needs_a_fix() -> None:
    with pytest.raises(AssertionError, match="memory has no fix"):
        Verdict("machine", "memory", "warning", "full")
