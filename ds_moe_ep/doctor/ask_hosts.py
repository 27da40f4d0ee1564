"""Asks the hosts of a hostfile over ssh, as the deepspeed launcher would start there; prints a host's own answer.

python -m ds_moe_ep.doctor.ask_hosts     # on a host: its name and versions, one line of JSON
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ds_moe_ep import __version__
from ds_moe_ep.doctor.gather import installed, told_behind
from ds_moe_ep.doctor.hosts import ENV_FILE, LAUNCHERS, HostAnswer, HostsFacts, read_hostfile

MODULE = "ds_moe_ep.doctor.ask_hosts"
MARK = "ds_moe_ep host: "
PACKAGES = ("torch", "deepspeed")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def ask_hosts(path: str, limit_s: float) -> HostsFacts:
    """Answers of a hostfile's hosts within `limit_s`, all at once. Raises ConfigError for a bad hostfile."""
    slots, environment = read_hostfile(path), dict(os.environ)
    return HostsFacts(
        path=path,
        slots=slots,
        answers=tuple(_answers(tuple(slots), limit_s)),
        launchers=frozenset(name for name, command in LAUNCHERS.items() if shutil.which(command)),
        silence_s=_silence_s(next(iter(slots)), environment),
        environment=environment,
        env_files={str(path): tuple(path.read_text().splitlines()) for path in env_files(environment)},
    )


def own_answer() -> dict[str, object]:
    """This host's name and versions."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = {"Python": python, **installed(PACKAGES), "ds_moe_ep": __version__}
    return {"own_name": socket.gethostname(), "versions": versions}


def env_files(environment: Mapping[str, str]) -> list[Path]:
    """The files of variables that the launcher reads, the one whose values count last."""
    name = environment.get("DS_ENV_FILE", ENV_FILE)
    return [path for folder in (Path.home(), Path.cwd()) if (path := folder / name).is_file()]


def _answers(names: tuple[str, ...], limit_s: float) -> list[HostAnswer]:
    here = os.getcwd()
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    call = shlex.join([sys.executable, "-m", MODULE])
    command = f"cd {shlex.quote(here)} && PYTHONPATH={shlex.quote(paths)} exec {call}"
    if shutil.which("ssh") is None:
        return [HostAnswer(name=name, error="no command ssh here") for name in names]
    deadline = time.monotonic() + limit_s
    started = {name: _ask(name, command) for name in names}
    return [_answer(name, process, deadline, limit_s) for name, process in started.items()]


def _ask(name: str, command: str) -> subprocess.Popen[str]:
    words, nothing = [*SSH, name, command], subprocess.DEVNULL
    return subprocess.Popen(
        words, stdin=nothing, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _answer(name: str, process: subprocess.Popen[str], deadline: float, limit_s: float) -> HostAnswer:
    try:
        answer, last = told_behind(MARK, process, deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return HostAnswer(name=name, error=f"no answer within {limit_s:g} s")
    return HostAnswer(name=name, **(answer or {"error": f"exit code {process.returncode}: {last.strip()}"}))


def _silence_s(name: str, environment: Mapping[str, str]) -> int:
    """Seconds after which pdsh's ssh gives up a host that says nothing; 0 for never."""
    given = shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        done = subprocess.run(["ssh", *given, "-G", name], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    settings = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
    return int(settings.get("serveraliveinterval", 0)) * int(settings.get("serveralivecountmax", 3))


if __name__ == "__main__":
    print(MARK + json.dumps(own_answer()))
