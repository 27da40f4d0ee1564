"""ds_configs and clusters that ship with the package, each known by the name of its file: `ep16`, `h100_4x4`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ds_moe_ep.errors import closest

PACKAGE = Path(__file__).parents[1]
# An installed package carries the folder inside; a checkout, and what pip installs from it editably, has it beside.
FOLDER = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "ds_configs"
SUFFIX = ".json"


def shipped_ds_configs() -> dict[str, Path]:
    """Files of the ds_configs by name, sorted."""
    return _files(FOLDER)


def shipped_clusters() -> dict[str, Path]:
    """Files of the clusters by name, sorted."""
    return _files(FOLDER / "clusters")


def path_of(given: str | os.PathLike[str], shipped: Mapping[str, Path]) -> Path:
    """The file that `given` names: its path, or where there is none, the name of a shipped file."""
    path = Path(given)
    if path.is_file() or path.name != str(path):
        return path
    return shipped.get(path.name.removesuffix(SUFFIX), path)


def way_to(path: Path, shipped: Mapping[str, Path]) -> str:
    """The way out of a file that is not there: the shipped file that comes closest to its name, and all of them."""
    close = closest(path.name.removesuffix(SUFFIX), shipped)
    question = f"did you mean {close!r}? " if close else ""
    return f"{question}give a path, or the name of one that ships: {', '.join(shipped)}"


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}
