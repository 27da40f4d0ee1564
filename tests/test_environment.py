"""Scripts and virtual environments: one that they did not make is checked, and never changed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.policy.sources import ROOT

MARK = ".made-by-ds-moe-ep"


def ensure(folder: Path, extras: str = "test", **variables: str) -> subprocess.CompletedProcess[str]:
    """Output of `ensure_environment` for VENV=`folder`; its last line is the interpreter it settles on."""
    words = f'source "{ROOT}/tests/environment.sh"; ensure_environment {extras}; echo "$PYTHON"'
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH", "VENV")}
    environment |= {"VENV": str(folder), **variables}
    command = ["bash", "-euo", "pipefail", "-c", words]
    return subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=240)


def foreign(folder: Path, borrowed: str = "") -> Path:
    """An environment of somebody's own, without pip; `borrowed` is a folder whose packages it has as well."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "borrowed.pth").write_text(borrowed)
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_a_foreign_environment_that_lacks_something_is_told_what_and_stays_as_it_is(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "mine")
    before = state(folder)
    done = ensure(folder, "test,mpi")
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: VENV={folder} was not made by this script")
    lacking = {line.strip().split(">")[0] for line in lines[1:-2]}
    assert {"torch", "deepspeed", "rich", "psutil", "pytest", "mypy", "mpi4py"} <= lacking
    assert f"  the command deepspeed in {folder / 'bin'}" in lines
    assert lines[-1].endswith(
        f"{folder}/bin/python -m pip install --constraint .constraints.txt --editable '.[test,mpi]'"
    )
    assert state(folder) == before


def test_a_foreign_environment_with_everything_is_used_with_this_checkout_and_stays_as_it_is(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "mine", borrowed=sysconfig.get_path("purelib"))
    (folder / "bin" / "deepspeed").touch()
    before = state(folder)
    done = ensure(folder)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(folder / "bin" / "python"), "")
    assert state(folder) == before


def test_an_environment_of_another_checkout_stays_that_ones(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", borrowed=sysconfig.get_path("purelib"))
    (folder / "bin" / "deepspeed").touch()
    (folder / MARK).write_text(f"{tmp_path}/ds_moe_ep\n")
    before = state(folder)
    done = ensure(folder)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(folder / "bin" / "python"), "")
    assert state(folder) == before


def test_a_release_outside_of_the_range_is_missing_and_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name, version in (("deepspeed", "0.1.0"), ("rich", "99.0")):
        (other / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (other / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    folder = foreign(tmp_path / "mine", borrowed=f"{other}\n{sysconfig.get_path('purelib')}")
    (folder / "bin" / "deepspeed").touch()
    done = ensure(folder)
    assert done.returncode == 1
    (lacking,) = (line for line in done.stderr.splitlines()[:-1] if line.startswith("  "))
    assert lacking.startswith("  deepspeed>=0.1") and lacking.endswith("(it has 0.1.0)")


@pytest.mark.parametrize("content", ["notes.txt", "bin"])
def test_a_folder_that_is_no_environment_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "documents"
    (folder / content).mkdir(parents=True)
    done = ensure(folder)
    assert done.returncode == 1 and f"VENV={folder} is a folder without bin/python" in done.stderr
    assert [path.name for path in folder.rglob("*")] == [content]


def test_an_environment_that_the_script_makes_is_marked_and_gets_the_pinned_versions(tmp_path: Path) -> None:
    folder, log = tmp_path / "new", tmp_path / "log"
    base = tmp_path / "python"  # makes an environment whose pip notes what it is asked for
    base.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin"; cp "{base}" "$3/bin/python"; exit; fi\n'
        f'if [[ "$1 $2" == "-m pip" ]]; then echo "$PIP_CONSTRAINT $*" >>"{log}"; exit; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    base.chmod(0o755)
    for _ in range(2):
        done = ensure(folder, PYTHON=str(base))
        assert (done.returncode, done.stdout.strip()) == (0, str(folder / "bin" / "python")), done.stderr
    assert (folder / MARK).read_text() == f"{ROOT}\n"
    assert log.read_text().splitlines() == [".constraints.txt -m pip install --quiet --editable .[test]"]


def test_the_quickstart_trains_nothing_in_a_foreign_environment_that_lacks_something(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "mine")
    before = state(folder)
    environment = {**os.environ, "VENV": str(folder)}
    for script in ("examples/quickstart.sh", "tests/run.sh"):
        done = subprocess.run(["bash", ROOT / script], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1 and "  torch\n" in done.stderr and done.stdout == ""
    assert state(folder) == before
