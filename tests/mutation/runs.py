"""A mutant in a temporary copy, and the tests of its file: each step a fork with torch and DeepSpeed loaded."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.mutation.mutants import Mutant
from tests.ranks import PRELOAD, REPOSITORY, SERVER_ENV

TESTS = Path(__file__).with_name("tests.txt")
QUIET = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", "not slow and not gpu"]
COPIED = ("ds_moe_ep", "tests", "ds_configs", "examples", ".pytest.ini", "setup.py")


def steps_for(path: str) -> list[list[str]]:
    """The tests of a file, step by step: the first pattern of the list that it fits."""
    for line in TESTS.read_text(encoding="utf-8").splitlines():
        pattern, _, steps = line.partition(": ")
        if line[:1] != "#" and fnmatch(path, f"ds_moe_ep/{pattern}"):
            return [step.split() for step in steps.split(" | ")]
    raise SystemExit(f"{TESTS.name}: no line for {path}; add one")


def run_step(copy: Path, tests: list[str], limit_s: float) -> tuple[int | None, str, float]:
    """The exit code (None: ran out of time), the first failure, and the seconds that it took."""
    began, log = time.monotonic(), copy / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os._exit(in_the_copy(copy, tests))
    code = None
    while code is None and time.monotonic() < began + limit_s:
        pid, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # the ranks too
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    failures = [t for t in log.read_text(errors="replace").splitlines() if t.startswith(("FAILED", "ERROR", "E  "))]
    return code, (failures or [""])[-1][:160], time.monotonic() - began


def in_the_copy(copy: Path, tests: list[str]) -> int:
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if p not in ("", str(REPOSITORY), str(REPOSITORY / "tests")))]
    os.environ["PYTHONPATH"] = str(copy)
    if tests[0] == "!":
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *QUIET, *tests[1:]])
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "ds_moe_ep")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    importlib.import_module("tests.ranks")._fork_server = lambda: get_context("fork")
    return int(pytest.main([*QUIET, *tests]))


@contextlib.contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in COPIED:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, Path(folder, name))
        yield Path(folder)


def judge(mutant: Mutant, text: str, copy: Path, times_s: dict[str, float]) -> None:
    """Puts the mutant into the copy, runs its tests until one fails, and puts the file back."""
    file, steps, began = copy / mutant.path, steps_for(mutant.path), time.monotonic()
    for step in steps:
        if " ".join(step) not in times_s:  # the tests of the unchanged file must pass, and say how long they take
            code, why, times_s[" ".join(step)] = run_step(copy, step, 600)
            if code:
                del times_s[" ".join(step)]
                mutant.outcome, mutant.because = "not judged", f"the unchanged copy fails too: {why}"
                return
    began, before = time.monotonic(), file.read_text(encoding="utf-8")
    mutant.outcome = "survived"
    try:
        file.write_text(text, encoding="utf-8")
        for step in steps:
            for stale in file.parent.glob(f"__pycache__/{file.stem}.*"):
                stale.unlink()
            code, mutant.because, _ = run_step(copy, step, 20 + 3 * times_s[" ".join(step)])
            if code != 0:
                mutant.outcome = "timed out" if code is None else "killed"
                break
    finally:
        file.write_text(before, encoding="utf-8")
        for stale in file.parent.glob(f"__pycache__/{file.stem}.*"):
            stale.unlink(missing_ok=True)
    mutant.seconds = round(time.monotonic() - began, 1)


def load_the_heavy_modules() -> None:
    os.environ.update(SERVER_ENV)
    for name in PRELOAD:
        if name.split(".")[0] not in ("tests", "ds_moe_ep"):
            importlib.import_module(name)
