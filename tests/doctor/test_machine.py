"""Verdicts on the machine and on environment variables."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds_moe_ep.doctor import gather
from ds_moe_ep.doctor.build_locks import build_locks
from ds_moe_ep.doctor.facts import BuildLock, Facts, TorchFacts
from ds_moe_ep.doctor.machine import judge_machine
from ds_moe_ep.doctor.variables import SPECIFIED, Run, judge_variables
from ds_moe_ep.doctor.verdicts import worst
from tests.doctor.machines import CPU, GPUS, named, on_host, with_variables

LOCK = "/x/py311/shm/lock"
CLUSTER = Run(num_ranks=4, num_nodes=4, depth=1)
ONE_NODE = Run(num_ranks=4, num_nodes=1, depth=1)


@pytest.mark.parametrize("facts", [CPU, GPUS])
def test_a_good_machine_is_well(facts: Facts) -> None:
    assert worst(judge_machine(facts, 4)) == "ok"
    assert worst(judge_variables(facts, CLUSTER)) == "ok"


@pytest.mark.parametrize(
    ("facts", "name", "status", "found", "fix"),
    [
        (on_host(CPU, free_bytes=1 << 30), "memory", "warning", "4 ranks take 2.4 GB", "fewer ranks"),
        (on_host(GPUS, shm_bytes=1 << 26), "shared memory", "warning", "0.07 GB", "--shm-size"),
        (on_host(CPU, shm_bytes=1 << 26), "shared memory", "ok", "0.07 GB", ""),
        (on_host(CPU, shm_left={"deepspeed_a": 2 << 30}), "files left", "warning", "1 DeepSpeed files", "rm "),
        (on_host(CPU, open_files=64), "open files", "warning", "may open 64 files", "ulimit -n"),
        (on_host(CPU, open_files=-1), "open files", "ok", "any number", ""),
        (on_host(CPU, locks={LOCK: BuildLock(age_s=9.0)}), "build lock", "warning", "no process holds", f"rm {LOCK}"),
        (on_host(CPU, locks={LOCK: BuildLock(age_s=9e4)}), "build lock", "warning", "waits for ever", f"rm {LOCK}"),
        (
            on_host(CPU, locks={LOCK: BuildLock(age_s=9e4, holder="process 7 (python)")}),
            "build lock",
            "note",
            "shm is being built by process 7 (python)",
            "",
        ),
        (
            on_host(CPU, locks={LOCK: BuildLock(age_s=9e4, all_seen=False)}),
            "build lock",
            "note",
            "of another user",
            "ask its owner",
        ),
        (on_host(CPU, addresses=()), "host name", "warning", "does not resolve", "GLOO_SOCKET_IFNAME"),
        (on_host(CPU, own_address=False), "host name", "warning", "not an address of this machine", "/etc/hosts"),
        (on_host(CPU, localhost=False), "host name", "warning", "localhost does not resolve", "/etc/hosts"),
        (on_host(CPU, launcher=""), "launcher", "note", "not on the PATH", "/env/bin/deepspeed"),
        (on_host(CPU, launcher="/usr/bin/deepspeed"), "launcher", "warning", "another environment", "/env/bin"),
        (on_host(CPU, launcher_beside=""), "launcher", "warning", "no deepspeed command", "torchrun"),
        (on_host(CPU, compiler=""), "compiler", "note", "no C++ compiler", "g++"),
    ],
)
def test_what_is_wrong_with_a_machine_is_named(facts: Facts, name: str, status: str, found: str, fix: str) -> None:
    verdict = named(judge_machine(facts, 4), name)
    assert verdict.status == status
    assert found in verdict.found
    assert fix in verdict.fix


@pytest.mark.parametrize(
    ("facts", "run", "name", "status", "found"),
    [
        (with_variables(GPUS, CUDA_VISIBLE_DEVICES="0,1,2,3"), CLUSTER, "CUDA_VISIBLE_DEVICES", "ok", "sees 4"),
        (with_variables(GPUS, CUDA_VISIBLE_DEVICES="0,9,2"), CLUSTER, "CUDA_VISIBLE_DEVICES", "warning", "names 3"),
        (with_variables(GPUS, NCCL_IB_HCA="mlx4_0,mlx5_1"), CLUSTER, "NCCL_IB_HCA", "warning", "no adapter mlx4_0"),
        (with_variables(GPUS, NCCL_IB_HCA="mlx5"), CLUSTER, "NCCL_IB_HCA", "ok", "mlx5"),
        (with_variables(GPUS, NCCL_IB_HCA="=mlx5"), CLUSTER, "NCCL_IB_HCA", "warning", "no adapter mlx5"),
        (with_variables(GPUS, NCCL_IB_HCA="^mlx9"), CLUSTER, "NCCL_IB_HCA", "ok", "^mlx9"),
        (with_variables(GPUS, NCCL_IB_HCA="mlx4_0"), ONE_NODE, "NCCL_IB_HCA", "ok", "between nodes alone"),
        (with_variables(GPUS, NCCL_SOCKET_IFNAME="ib9"), CLUSTER, "NCCL_SOCKET_IFNAME", "problem", "lo, eth0, ib0"),
        (with_variables(GPUS, NCCL_SOCKET_IFNAME="eth"), CLUSTER, "NCCL_SOCKET_IFNAME", "ok", "eth"),
        (with_variables(GPUS, NCCL_NTHREADS="500"), CLUSTER, "NCCL_NTHREADS", "warning", "64, 128, 256, 512"),
        (GPUS, replace(CLUSTER, depth=2), "CUDA_DEVICE_MAX_CONNECTIONS", "note", "moe_ep.depth=2"),
        (
            with_variables(GPUS, CUDA_DEVICE_MAX_CONNECTIONS="99"),
            CLUSTER,
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "warning",
            "1 to 32",
        ),
        (
            with_variables(GPUS, CUDA_LAUNCH_BLOCKING="1"),
            CLUSTER,
            "CUDA_LAUNCH_BLOCKING",
            "warning",
            "nothing overlaps",
        ),
        (with_variables(GPUS, DS_ACCELERATOR="cpu"), CLUSTER, "DS_ACCELERATOR", "warning", "4 GPUs stay idle"),
        (with_variables(CPU, DS_ACCELERATOR="cuda"), CLUSTER, "DS_ACCELERATOR", "problem", "sees no GPU"),
        (with_variables(CPU, OMP_NUM_THREADS="96"), CLUSTER, "OMP_NUM_THREADS", "warning", "start 96 threads each"),
        (with_variables(CPU, OMP_NUM_THREADS="many"), CLUSTER, "OMP_NUM_THREADS", "warning", "no number"),
        (with_variables(CPU, GLOO_SOCKET_IFNAME="ib9"), CLUSTER, "GLOO_SOCKET_IFNAME", "problem", "no such interface"),
        (with_variables(CPU, GLOO_SOCKET_IFNAME="lo"), CLUSTER, "GLOO_SOCKET_IFNAME", "warning", "no other node"),
        (with_variables(CPU, GLOO_SOCKET_IFNAME="lo"), ONE_NODE, "GLOO_SOCKET_IFNAME", "ok", "lo"),
        (
            with_variables(CPU, TORCH_DISTRIBUTED_DEBUG="DETAIL"),
            CLUSTER,
            "TORCH_DISTRIBUTED_DEBUG",
            "warning",
            "times mean little",
        ),
    ],
)
def test_a_variable_is_judged_by_the_machine_and_the_run(
    facts: Facts, run: Run, name: str, status: str, found: str
) -> None:
    verdict = named(judge_variables(facts, run), name)
    assert verdict.status == status
    assert found in verdict.found


def test_the_specifications_variables_all_have_a_line_and_matter_on_gpus_alone() -> None:
    nonsense = dict.fromkeys(SPECIFIED, "nonsense")
    on_cpu = {verdict.name: verdict for verdict in judge_variables(with_variables(CPU, **nonsense), CLUSTER)}
    assert {(on_cpu[name].status, on_cpu[name].applies) for name in SPECIFIED} == {("ok", False)}
    on_gpus = {verdict.name: verdict for verdict in judge_variables(with_variables(GPUS, **nonsense), CLUSTER)}
    assert {on_gpus[name].status for name in SPECIFIED} == {"warning", "problem"}


def test_gpus_that_deepspeed_is_told_not_to_use_leave_a_machine_of_cpus() -> None:
    assert with_variables(GPUS, DS_ACCELERATOR="cpu").device == "cpu"
    assert GPUS.device == "cuda"
    assert replace(GPUS, torch=TorchFacts(version="2")).device == "cpu"


def test_left_files_locks_and_names_are_found_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_allreduce_buffer_0").write_bytes(b"1234")
    (tmp_path / "other").touch()
    assert gather.files_left(tmp_path) == {"deepspeed_allreduce_buffer_0": 4}
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert gather.resolve("no such name") == ()
    assert gather.can_bind("127.0.0.1")
    assert not gather.can_bind("192.0.2.1")  # an address for documentation: nobody's
    facts = gather.host_facts({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert facts.name == socket.gethostname()
    assert facts.free_bytes > 0
    assert "lo" in facts.interfaces
    assert list(facts.locks) == [str(lock)]


def builder(lock: Path) -> subprocess.Popen[str]:
    """A process that holds torch's own lock of a build, as torch does while it compiles."""
    (torch_folder,) = importlib.util.find_spec("torch").submodule_search_locations  # type: ignore[union-attr,misc]
    script = (
        "import runpy, sys\n"
        f"baton = runpy.run_path({torch_folder + '/utils/file_baton.py'!r})['FileBaton']({str(lock)!r})\n"
        "print(baton.try_acquire(), flush=True)\n"
        "sys.stdin.read()\n"
        "baton.release()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "True\n"
    return process  # type: ignore[no-any-return]


def lock_verdict(folder: Path) -> tuple[str, str] | None:
    """Status and finding on the one lock under `folder`, or None where there is none."""
    verdicts = judge_machine(on_host(CPU, locks=build_locks(folder)), 1)
    found = [(verdict.status, verdict.found) for verdict in verdicts if verdict.name == "build lock"]
    return found[0] if found else None


def test_a_build_lock_is_stale_only_where_no_process_holds_it_however_old_it_is(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with builder(lock) as alive:
        os.utime(lock, (0, 0))  # of 1970
        status, found = lock_verdict(tmp_path) or ("", "")
        assert status == "note"
        assert f"deepspeed_shm_comm is being built by process {alive.pid} (" in found
        alive.communicate("done")
    assert lock_verdict(tmp_path) is None, "the build ended and took its lock along"
    with builder(lock) as killed:
        killed.kill()
        killed.communicate()
    assert build_locks(tmp_path)[str(lock)].age_s < 60, "a lock of a moment ago"
    status, found = lock_verdict(tmp_path) or ("", "")
    assert (status, "no process holds the lock" in found) == ("warning", True)


def test_a_lock_that_its_holder_has_by_another_path_is_held(tmp_path: Path) -> None:
    """As in a container that has the folder in another place."""
    lock, other = tmp_path / "some_extension" / "lock", tmp_path / "elsewhere"
    lock.parent.mkdir()
    with builder(other) as alive:
        os.link(other, lock)
        assert build_locks(tmp_path)[str(lock)].holder.startswith(f"process {alive.pid} (")
        alive.communicate("done")


def test_a_lock_of_a_user_whose_processes_are_hidden_is_never_called_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "some_extension" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert (lock_verdict(tmp_path) or ("",))[0] == "note"
