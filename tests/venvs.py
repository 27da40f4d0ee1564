"""Virtual environments with other releases of a package, for slow tests.

1. An environment of its own has the other releases first on its path, and this interpreter's packages behind them: it
   costs a few megabytes, and torch stands on the disk once.
2. They lie in the folder that DS_MOE_EP_TEST_VENVS names, by default one below the system's temporary folder, and are
   used again by later runs.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import pytest

VARIABLE = "DS_MOE_EP_TEST_VENVS"
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# DeepSpeed before 0.19 is built on installation: with this interpreter's torch and setuptools, and without its ops.
INSTALL = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-build-isolation")
BUILD = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu", "PIP_CONSTRAINT": ""}


def python_with(*wishes: str, with_dependencies: bool = False) -> pathlib.Path:
    """An interpreter with these releases ("deepspeed==0.17.6") before this one's packages.

    `with_dependencies` installs what they need too, where this interpreter does not have it. Skips the test by name
    where they cannot be installed.
    """
    name = "-".join([f"py{sysconfig.get_python_version()}", *wishes]).replace("==", "-")
    folder = pathlib.Path(os.environ.get(VARIABLE) or f"{tempfile.gettempdir()}/ds_moe_ep_venvs") / name
    python = folder / "bin" / "python"
    if not python.exists():
        _make(folder, wishes if with_dependencies else ("--no-deps", *wishes))
    return python


def _make(folder: pathlib.Path, wishes: tuple[str, ...]) -> None:
    """Makes the environment aside and moves it to its place, so that none is half made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        made = pathlib.Path(aside, folder.name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
        (packages,) = made.glob("lib/python*/site-packages")
        (packages / "behind.pth").write_text(sysconfig.get_path("purelib"))
        python = str(made / "bin" / "python")
        done = subprocess.run(
            [sys.executable, *INSTALL[:2], "--python", python, *INSTALL[2:], *wishes],
            env={**os.environ, **BUILD},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"{' '.join(wishes)} cannot be installed here: {last}")
        shutil.move(made, folder)


def run_python(python: pathlib.Path, *arguments: str, timeout_s: float = 500.0) -> str:
    """Output of a command of that interpreter, started in the repository. Fails with it where the command fails."""
    done = subprocess.run(
        [python, *arguments],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
