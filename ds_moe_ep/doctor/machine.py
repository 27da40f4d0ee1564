"""Verdicts on this machine: memory, files, names, the launcher."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ds_moe_ep.doctor.facts import BuildLock, Facts, HostFacts
from ds_moe_ep.doctor.verdicts import Verdict
from ds_moe_ep.records.quantity import gigabytes, number

_verdict = partial(Verdict, "machine")

RANK_BYTES = 0.6e9  # what a rank needs before it has a model: torch, deepspeed, groups
NCCL_SHM_BYTES = 1e9
RANK_FILES = 128  # sockets and files of a rank: a full mesh of its peers per communicator


def judge_machine(facts: Facts, num_ranks: int) -> list[Verdict]:
    """One verdict per resource; `num_ranks` is how many ranks of a run stand on this machine."""
    host = facts.host
    return [
        judge_memory(host.free_bytes, num_ranks),
        judge_shared_memory(host.shm_bytes, facts.device == "cuda"),
        *judge_files_left(host),
        judge_open_files(host.open_files, num_ranks),
        *(judge_lock(path, lock) for path, lock in host.locks.items()),
        judge_name(host, facts.environment.get("GLOO_SOCKET_IFNAME")),
        judge_launcher(host),
        judge_compiler(host),
    ]


def judge_memory(free_bytes: int, num_ranks: int) -> Verdict:
    """Memory for the ranks' start; the model's is `judge_job`'s to judge."""
    found = f"{gigabytes(free_bytes, 1)} free"
    needed = RANK_BYTES * num_ranks
    if free_bytes < needed:
        found = f"{found}: {num_ranks} ranks take {gigabytes(needed, 1)} before they have a model"
        return _verdict("memory", "warning", found, "start fewer ranks here, or end what fills the memory")
    return _verdict("memory", "ok", found)


def judge_shared_memory(size_bytes: int | None, uses_nccl: bool) -> Verdict:
    """The room in /dev/shm for NCCL's buffers and data loaders' batches."""
    if size_bytes is None:
        return _verdict("shared memory", "note", "there is no /dev/shm")
    found = f"/dev/shm has {gigabytes(size_bytes, 2)}"
    if size_bytes < NCCL_SHM_BYTES and uses_nccl:
        fix = "start the container with --shm-size=8g (or --ipc=host)"
        return _verdict("shared memory", "warning", f"{found}: NCCL and data loaders share it", fix)
    return _verdict("shared memory", "ok", found, applies=uses_nccl)


def judge_files_left(host: HostFacts) -> Iterator[Verdict]:
    """DeepSpeed's files in shared memory, which killed ranks leave behind."""
    if host.shm_left:
        total = gigabytes(sum(host.shm_left.values()), 1)
        found = f"{len(host.shm_left)} DeepSpeed files in /dev/shm ({total}): a run's, or what killed ranks left"
        yield _verdict("files left", "warning", found, "when no run is on this machine: rm /dev/shm/deepspeed_*")


def judge_open_files(limit: int, num_ranks: int) -> Verdict:
    """The limit of open files against the sockets of one rank."""
    needed = RANK_FILES + 8 * num_ranks
    if 0 <= limit < needed:  # a limit of -1 is none
        found = f"a process may open {limit} files; a rank of {num_ranks} may need {needed}"
        return _verdict("open files", "warning", found, f"ulimit -n {max(4096, needed)}")
    return _verdict("open files", "ok", f"a process may open {f'{limit:,}' if limit >= 0 else 'any number of'} files")


def judge_lock(path: str, lock: BuildLock) -> Verdict:
    """The lock of a torch extension's build: stale where no process of this host holds it, however young or old it is.

    The next build waits for a stale one without a word.
    """
    extension = Path(path).parent.name
    if lock.holder:
        return _verdict(
            "build lock", "note", f"{extension} is being built by {lock.holder} for {number(lock.age_s, 0)} s"
        )
    if not lock.all_seen:
        found = (
            f"{extension}: a lock of {number(lock.age_s, 0)} s, of another user, whose processes cannot be looked into"
        )
        return _verdict("build lock", "note", found, f"ask its owner; when nothing builds the extension: rm {path}")
    found = f"{extension}: no process holds the lock, so whoever needs the extension waits for ever"
    return _verdict("build lock", "warning", found, f"rm {path} (unless another host or container builds there now)")


def judge_name(host: HostFacts, gloo_interface: str | None) -> Verdict:
    """This machine's name and its address: gloo listens there, unless an interface is named."""
    if not host.localhost:
        fix = "add '127.0.0.1 localhost' to /etc/hosts"
        return _verdict("host name", "warning", "localhost does not resolve to this machine", fix)
    if gloo_interface:
        return _verdict("host name", "ok", f"{host.name}; gloo listens on {gloo_interface}")
    fix = "name an interface in GLOO_SOCKET_IFNAME (lo for one machine), or correct /etc/hosts"
    if not host.addresses:
        return _verdict("host name", "warning", f"{host.name} does not resolve: gloo may find no address", fix)
    found = f"{host.name} is {host.addresses[0]}"
    if not host.own_address:
        return _verdict("host name", "warning", f"{found}, which is not an address of this machine", fix)
    return _verdict("host name", "ok", found)


def judge_launcher(host: HostFacts) -> Verdict:
    """The `deepspeed` command: it should start the launcher of this Python."""
    if not host.launcher_beside:
        fix = "pip install deepspeed with this Python, or start with torchrun"
        return _verdict("launcher", "warning", "there is no deepspeed command beside this Python", fix)
    activate = f"activate the environment, or call {host.launcher_beside}"
    if not host.launcher:
        return _verdict("launcher", "note", "`deepspeed` is not on the PATH", activate)
    if Path(host.launcher).resolve() != Path(host.launcher_beside).resolve():
        return _verdict("launcher", "warning", f"`deepspeed` is {host.launcher}, of another environment", activate)
    return _verdict("launcher", "ok", host.launcher)


def judge_compiler(host: HostFacts) -> Verdict:
    """The C++ compiler, for DeepSpeed's operations that are built at their first use."""
    if host.compiler:
        return _verdict("compiler", "ok", host.compiler)
    found = "no C++ compiler: DeepSpeed cannot build its own operations (an offloaded optimizer needs one)"
    return _verdict("compiler", "note", found, "install g++, or set torch_adam in the optimizer's params")
