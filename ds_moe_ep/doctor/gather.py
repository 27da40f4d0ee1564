"""Reads the facts of this machine; libraries are looked at in processes of their own, with a time limit."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ds_moe_ep.doctor.build_locks import build_locks, extensions_folder
from ds_moe_ep.doctor.facts import ApexFacts, DeepSpeedFacts, Facts, Gpu, HostFacts, TorchFacts, TritonFacts
from ds_moe_ep.doctor.probe import MARK, PROBES

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "nvidia-ml-py", "mpi4py", "ninja")
PROBE_LIMIT_S = 120.0  # importing torch and deepspeed takes seconds, on a busy machine a minute
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY_USED = Path("/sys/fs/cgroup/memory.current")
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")


def gather(limit_s: float = PROBE_LIMIT_S) -> Facts:
    """The facts of this machine; a library that does not answer within `limit_s` is told as one that fails."""
    environment = dict(os.environ)
    names = [name for name in PROBES if importlib.util.find_spec(name) is not None]
    found = run_probes(names, limit_s)
    missing = {name: {"error": "it is not installed"} for name in PROBES if name not in found}
    found = {**missing, **found}
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        versions=installed(PACKAGES),
        torch=torch_facts(found["torch"]),
        deepspeed=deepspeed_facts(found["deepspeed"]),
        triton=triton_facts(found["triton"]) if "triton" in names else TritonFacts(),
        apex=apex_facts(found["apex"]),
        host=host_facts(environment),
        environment=environment,
    )


def run_probes(names: Iterable[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Results of the named probes; {"error": why} for one that dies or does not answer in time."""
    command = [sys.executable, "-m", "ds_moe_ep.doctor.probe"]
    deadline = time.monotonic() + limit_s
    processes = {
        name: subprocess.Popen(
            [*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for name in names
    }
    try:
        return {name: _answer(process, deadline, limit_s) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _answer(process: subprocess.Popen[str], deadline: float, limit_s: float) -> dict[str, Any]:
    try:
        answer, last = told_behind(MARK, process, deadline)
    except subprocess.TimeoutExpired:
        return {"error": f"its import did not end within {limit_s:g} s"}
    return answer or {"error": f"its import ended the process with {process.returncode}: {last}"}


def told_behind(mark: str, process: subprocess.Popen[str], deadline: float) -> tuple[dict[str, Any], str]:
    """The object of JSON in the last line that begins with a mark, else nothing; and the last line of the process.

    Raises subprocess.TimeoutExpired for a process that runs at the deadline, by time.monotonic.
    """
    printed, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    lines = [line for line in reversed(printed.splitlines()) if line.strip()]
    told: str = next((line.removeprefix(mark) for line in lines if line.startswith(mark)), "{}")
    return json.loads(told), (lines[0] if lines else "without a word")


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each distribution; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def torch_facts(found: Mapping[str, Any]) -> TorchFacts:
    """Result of probe_torch as a value."""
    devices = tuple(Gpu(name, size, (major, minor)) for name, size, (major, minor) in found.get("devices", ()))
    rest = {name: value for name, value in found.items() if name not in ("devices", "apart")}
    return TorchFacts(**rest, devices=devices, apart=tuple((i, j) for i, j in found.get("apart", ())))


def deepspeed_facts(found: Mapping[str, Any]) -> DeepSpeedFacts:
    """Result of probe_deepspeed as a value."""
    return DeepSpeedFacts(**{**found, "tested": tuple(found.get("tested", ()))})


def triton_facts(found: Mapping[str, Any]) -> TritonFacts:
    """Result of probe_triton as a value; installed even where it does not import."""
    return TritonFacts(**{"version": installed(["triton"])["triton"] or "of unknown version", **found})


def apex_facts(found: Mapping[str, Any]) -> ApexFacts:
    """Result of probe_apex, with the place of whatever is called apex."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return ApexFacts()
    folders = spec.submodule_search_locations or ()
    return ApexFacts(
        place=str(next(iter(folders), spec.origin or "unknown")),
        version=installed(["apex"])["apex"] or "",
        has_normalization=any((Path(folder) / "normalization").is_dir() for folder in folders),
        offers=tuple(found.get("offers", ())),
        reason=str(found.get("error") or found.get("reason", "")),
    )


def host_facts(environment: Mapping[str, str]) -> HostFacts:
    """Facts that the machine tells of itself."""
    name = socket.gethostname()
    addresses, beside = resolve(name), Path(sys.executable).parent / "deepspeed"
    return HostFacts(
        name=name,
        cores=len(os.sched_getaffinity(0)),
        free_bytes=free_memory(),
        shm_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        shm_left=files_left(SHARED_MEMORY),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locks=build_locks(extensions_folder(environment)),
        addresses=addresses,
        own_address=bool(addresses) and can_bind(addresses[0]),
        localhost=any(address.startswith("127.") or address == "::1" for address in resolve("localhost")),
        interfaces=tuple(interface for _, interface in socket.if_nameindex()),
        adapters=tuple(sorted(path.name for path in INFINIBAND.iterdir())) if INFINIBAND.is_dir() else (),
        num_gpu_files=sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*")),
        compiler=next((path for each in ("c++", "g++", "clang++") if (path := shutil.which(each))), ""),
        launcher=shutil.which("deepspeed") or "",
        launcher_beside=str(beside) if beside.exists() else "",
    )


def free_memory() -> int:
    """Bytes that new processes may take: what the system calls available, or what a container's limit leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(MEMORY_LIMIT.read_text()) - int(MEMORY_USED.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def files_left(folder: Path) -> dict[str, int]:
    """DeepSpeed's files in shared memory and their bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("deepspeed_*")) if path.is_file()}


def resolve(name: str) -> tuple[str, ...]:
    """The addresses of `name`, IPv4 first; none where it is unknown."""
    try:
        found = {(family, str(address[0])) for family, *_, address in socket.getaddrinfo(name, None)}
    except OSError:
        return ()
    return tuple(address for _, address in sorted(found))


def can_bind(address: str) -> bool:
    """True where `address` is one of this machine's own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
