"""Every block of commands in README, the pages and examples' page runs as it stands, in a copy of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe_ep.bench.harness.processes import free_port
from tests.pages import PAGES
from tests.policy.links import Block, commands
from tests.policy.sources import ROOT

BLOCKS = [block for path in (*PAGES, ROOT / "examples" / "README.md") for block in commands(path)]
COMMANDS = Path(sys.executable).parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")


def name_of(block: Block) -> str:
    return f"{block.page.name}: {block.text.split(chr(10))[0][:60]}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "repository"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    return folder


def launcher(folder: Path) -> Path:
    """A folder with a `deepspeed` that meets at a port of its own: other jobs on this machine take the usual one."""
    script = folder / "deepspeed"
    folder.mkdir()
    script.write_text(
        f'#!/bin/sh\nexec "{Path(sys.executable).parent / "deepspeed"}" --master_port {free_port()} "$@"\n'
    )
    script.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_documented_block_of_commands_runs(block: Block, copy: Path, tmp_path: Path) -> None:
    if block.not_run:
        pytest.skip(block.not_run)
    here = os.environ | {
        "PATH": os.pathsep.join(map(str, (launcher(tmp_path / "bin"), COMMANDS, os.environ["PATH"]))),
        "PYTHONPATH": str(copy),
        "VENV": sys.prefix,  # the environment that the scripts use: this one, which they do not change
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=copy, env=here, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_what_is_not_run_says_why() -> None:
    assert all(len(block.not_run) > 8 for block in BLOCKS if block.not_run)
    run = [block for block in BLOCKS if not block.not_run]
    assert len(run) >= 20 and {block.page.name for block in run} >= {"README.md", "measuring.md", "planning.md"}
    assert any(block.page.parent.name == "examples" for block in run)
