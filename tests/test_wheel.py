"""The built package is enough: its commands, ds_configs and clusters work where there is no checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from tests.policy.links import FENCE, prose
from tests.policy.sources import ROOT

SOURCES = ("setup.py", "README.md", "ds_moe_ep", "ds_configs")
BUILD = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]


def run(words: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """A finished command, which does not find this checkout by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "COV"))}
    return subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def done(words: list[str | Path], folder: Path) -> str:
    finished = run(words, folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def copy_sources(folder: Path) -> Path:
    """A checkout of its own: a build writes beside its sources."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    done([sys.executable, "-m", "pip", "wheel", *BUILD, "-w", folder, source], folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_sources(folder / "source"), folder / "built")


def environment_of(folder: Path, what: list[str | Path]) -> Path:
    """The commands of a fresh environment with the package in it, which borrows the libraries of this one."""
    venv.create(folder, symlinks=True, with_pip=False)
    scheme = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    (Path(scheme) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    interpreter = folder / "bin" / "python"
    done([sys.executable, "-m", "pip", "--python", interpreter, "install", *BUILD, *what], folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_of(tmp_path_factory.mktemp("installed"), [wheel])


def test_the_wheel_has_every_file_of_the_package_and_every_ds_config_and_cluster(wheel: Path) -> None:
    modules = {f"{path.relative_to(ROOT)}" for path in (ROOT / "ds_moe_ep").rglob("*.py")}
    data = {f"ds_moe_ep/configs/{path.relative_to(ROOT / 'ds_configs')}" for path in ROOT.glob("ds_configs/**/*.json")}
    assert len(data) >= 13
    pages = {f"{path.relative_to(ROOT)}" for path in (ROOT / "ds_moe_ep" / "docs").glob("*.md")}
    assert len(pages) >= 15
    others = {f"ds_moe_ep/{name}" for name in ("ARCHITECTURE.md", "py.typed", "live/page.html")}
    assert names_in(wheel) == modules | data | pages | others


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_description_is_readme_with_links_that_work_on_an_index_page(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    shown, readme = str(metadata.get_payload()), (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert re.findall(r"\]\((?!https?:)", prose(readme)), "or this test says nothing"
    assert re.findall(r"\]\((?!https?:)|<!--|!\[", prose(shown)) == []
    assert re.findall(r"\]\(https?:[^)]+\)", shown) == re.findall(r"\]\(https?:[^)]+\)", readme)
    assert re.findall(r"^#.*$", shown, re.MULTILINE) == re.findall(r"^#.*$", readme, re.MULTILINE)
    assert FENCE.findall(shown) == FENCE.findall(readme)
    assert "All limits have a way out" in shown  # a link's words


def test_the_wheel_says_what_it_is_for_and_what_it_needs(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    (version,) = set(re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:1])
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("ds-moe-ep", version, ">=3.10")
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= {*metadata.get_all("Classifier", [])}
    assert "expert parallelism" in metadata["Keywords"]


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    done([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    assert names_in(build_wheel(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "built")) == names_in(wheel)


def test_the_installed_commands_find_what_ships_by_its_name(commands: Path, tmp_path: Path) -> None:
    place = done([commands / "python", "-c", "import ds_moe_ep; print(ds_moe_ep.__file__)"], tmp_path)
    assert Path(place.strip()).is_relative_to(commands.parent)
    command = commands / "ds-moe-ep"
    assert "ep16_cpu: can run" in done([command, "check-config", "ep16_cpu"], tmp_path)
    assert "ep8.json: can run" in done([command, "check-config", "ep8.json", "--gpu-gb", "80"], tmp_path)
    plan = json.loads(done([command, "plan", "--config", "ep16", "--cluster", "h100_4x4", "--json"], tmp_path))
    assert (plan["system"], plan["cluster"]["ranks"]) == ("ep16", 16)
    assert "| figure |" in done([command, "audit", "--markdown"], tmp_path).lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["check-config", "ep16_gpu"],
            "config='ep16_gpu': cannot be read (No such file or directory); did you mean",
        ),
        (["check-config", "ds_configs/ep8.json"], "did you mean 'ep8'?"),
        (["plan", "--config", "ep16", "--cluster", "h100_4_4"], "did you mean 'h100_4x4'?"),
        (["plan", "--config", "mine.json", "--cluster", "h100_4x4"], "ships: ep1, ep16, ep16_cpu, ep1_cpu, ep4,"),
        (["audit", "--cluster", "moon"], "ships: h100_2x8, h100_4x4, testbed_4x4"),
    ],
)
def test_an_unknown_name_exits_with_2_and_lists_the_names_that_there_are(
    commands: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    finished = run([commands / "ds-moe-ep", *words], tmp_path)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert finished.stdout == ""
    assert message in finished.stderr
    assert "give a path, or the name of one that ships: " in finished.stderr


def test_an_editable_install_reads_the_checkouts_files(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    commands = environment_of(tmp_path / "environment", ["--editable", source])
    (source / "ds_configs" / "ep2.json").write_text((source / "ds_configs" / "ep4_cpu.json").read_text())
    (tmp_path / "empty").mkdir()
    assert "ep2: can run" in done([commands / "ds-moe-ep", "check-config", "ep2"], tmp_path / "empty")


def test_a_file_in_the_way_wins_over_the_name_of_one_that_ships(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "ep16").write_text("{")
    assert "line 1, column 2 is not JSON" in run([commands / "ds-moe-ep", "check-config", "ep16"], tmp_path).stderr
    (tmp_path / "ep8").mkdir()  # a folder is no ds_config
    assert "ep8: can run" in done([commands / "ds-moe-ep", "check-config", "ep8"], tmp_path)
