"""Says what an environment lacks of setup.py's requirements; exit code 1 where it lacks something.

    python tests/missing.py [EXTRAS]     EXTRAS is a comma-separated list of extras of setup.py

Needs the standard library alone, and changes nothing.
"""

from __future__ import annotations

import re
import runpy
import sys
import types
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("deepspeed",)  # of the environment's own: it starts ranks with the interpreter beside it


def main(extras: str) -> int:
    """Prints what is missing, a line each, and the way out."""
    folder = Path(sys.executable).parent
    missing = [text for line in requirements(extras) if (text := missing_of(line))]
    missing += [f"the command {name} in {folder}" for name in COMMANDS if not (folder / name).exists()]
    if not missing:
        return 0
    what = f".[{extras}]" if extras else "."
    print(
        f"error: VENV={folder.parent} was not made by this script, which therefore changes nothing in it. It lacks:",
        *(f"  {text}" for text in missing),
        "install that, or name a folder that does not exist by VENV=..., and the environment is made there:",
        f"  cd {ROOT} && {sys.executable} -m pip install --constraint .constraints.txt --editable '{what}'",
        sep="\n",
        file=sys.stderr,
    )
    return 1


def requirements(extras: str) -> list[str]:
    """The requirements in setup.py, those of the extras included; read without setuptools, which may be missing."""
    given: dict[str, Any] = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.__dict__.update(setup=given.update, find_packages=lambda **_: [])
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = stand_in
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        del sys.modules["setuptools"]
        if before is not None:
            sys.modules["setuptools"] = before
    chosen = [name for name in extras.split(",") if name]
    return list(dict.fromkeys([*given["install_requires"], *(r for e in chosen for r in given["extras_require"][e])]))


def missing_of(line: str) -> str | None:
    """The requirement and what is installed instead; None where it is satisfied, or is for another platform."""
    name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
    requirement = next(parsers(), str)(line)
    marker = getattr(requirement, "marker", None)
    if marker is not None and not marker.evaluate():
        return None
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return line
    allowed = getattr(requirement, "specifier", None)
    if allowed is None or allowed.contains(version, prereleases=True):
        return None
    return f"{line} (it has {version})"


def parsers() -> Iterator[Any]:
    """Classes that read a requirement; none where neither packaging nor pip is there, and versions go unchecked."""
    for module in ("packaging.requirements", "pip._vendor.packaging.requirements"):
        try:
            yield import_module(module).Requirement
        except ImportError:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
