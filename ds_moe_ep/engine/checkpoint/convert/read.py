"""Reads a checkpoint's files: as tensors and plain values alone, mapped, and checked for damage."""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_moe_ep.errors import EngineError

SAVING, OLD = ".saving", ".old"  # ends of the names of folders that are not complete, or on their way out
_ALLOW = "torch.serialization.add_safe_globals"


def find_tag(source: Path) -> str:
    """The tag that the file `latest` names."""
    try:
        tag = (source / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{source / 'latest'}: cannot be read ({error}); {tags_in(source)}") from None
    if not tag:
        raise EngineError(f"{source / 'latest'}: names no tag; {tags_in(source)}")
    return tag


def tags_in(source: Path) -> str:
    """The way out for a tag that is missing."""
    folders = [path for path in source.iterdir() if path.is_dir()] if source.is_dir() else []
    tags = sorted(path.name for path in folders if not path.name.endswith(SAVING))
    known = f"choose a tag of {', '.join(tags)}, or " if tags else ""
    return f"{known}name the folder that was given to engine.save_checkpoint"


def load_file(path: Path, map_location: Any = "cpu", is_mapped: bool = True) -> Any:
    """The content of a checkpoint's file, with its tensors mapped and not read, unless `is_mapped` is False.

    Only tensors, plain values and DeepSpeed's own small classes are made: a file of unknown origin runs no code.
    """
    if not path.is_file():
        raise EngineError(f"{path}: no such file; complete the folder")
    if not is_zip(path):
        raise EngineError(f"{path}: is cut off, or no file of torch.save in its zip form; save the checkpoint again")
    try:
        with torch.serialization.safe_globals([*deepspeeds_classes(), *numpys_functions()]):
            return torch.load(path, map_location=map_location, mmap=is_mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "something that is no tensor"
        raise EngineError(
            f"{path}: holds {what}, and making it could run code of the file's; save the checkpoint again without it "
            f"(a client_state of plain values and tensors), or, where you trust it: {_ALLOW}([...])"
        ) from error
    except Exception as error:
        raise EngineError(f"{path}: cannot be read ({type(error).__name__}: {error}); save it again") from error


def is_zip(path: str | Path) -> bool:
    """True for a file in the form of a zip, with a whole directory at its end."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a bit of the directory's end
        return False


def deepspeeds_classes() -> list[Any]:
    """The classes that DeepSpeed itself puts into files of a checkpoint; those of them that the release has."""
    homes = {
        "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
        "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
        "deepspeed.utils.tensor_fragment": ("fragment_address",),
    }
    modules = ((importlib.import_module(module), names) for module, names in homes.items())
    return [getattr(module, name) for module, names in modules for name in names if hasattr(module, name)]


def numpys_functions() -> list[Any]:
    """Makers of numpy's arrays, which hold values alone: numpy's random state is one, beside plain values."""
    array = np.zeros(1, dtype=np.uint32)
    reconstruct = array.__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("u1", "u4", "u8", "i4", "i8", "f4", "f8", "?")}
    return [reconstruct, np.ndarray, np.dtype, *kinds]


def check_undamaged(path: Path) -> None:
    """Raises EngineError where a part of a file is not what was written: torch.save keeps a CRC-32 of each."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of a damaged directory too: other compression, encryption, sizes
        raise EngineError(f"{path}: is damaged ({error}); {_OTHER_COPY}") from error
    if damaged is not None:
        raise EngineError(f"{path}: is damaged, the checksum of its part {damaged} does not fit; {_OTHER_COPY}")


_OTHER_COPY = "take another copy of it or an earlier tag, and check the disk"
