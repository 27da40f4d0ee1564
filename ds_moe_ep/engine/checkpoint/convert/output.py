"""Writes a folder of large files so that a kill loses the file at hand alone.

1. Files go into `<target>.part`, each under a temporary name first. On disk, it takes its name, and its line in
   `SHA256SUMS` follows (the form of `sha256sum --check`).
2. A rerun of the same conversion finds `.part` and its `conversion.json`, skips the files whose bytes still have their
   checksum, and writes the others. `.part` of anything else is refused.
3. At the end the folder takes its name. An error, or Ctrl-C, leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.engine.checkpoint.convert.read import check_undamaged
from ds_moe_ep.engine.checkpoint.folders import flush
from ds_moe_ep.errors import EngineError
from ds_moe_ep.records.quantity import gigabytes

SUMS, IDENTITY, WRITING = "SHA256SUMS", "conversion.json", ".writing"
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TargetFile:
    """A file to write. `name` is relative to the target, `num_bytes` those of its tensors.

    `reads` are the source's files that it is made of: each is checked for damage before it is first used.
    """

    name: str
    num_bytes: int
    write: Callable[[Path], None]
    reads: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TargetFolder:
    """A folder to write. `identity` says in plain values which conversion of which bytes it is."""

    path: Path
    files: Sequence[TargetFile]
    identity: Mapping[str, Any]

    def check_free(self) -> None:
        """Raises EngineError where the folder exists, or an unfinished one that is not of the same conversion."""
        advice = "exists, and a conversion overwrites nothing; remove it or name another folder"
        if self.path.exists():
            raise EngineError(f"{self.path}: {advice}")
        partial = beside(self.path)
        if not partial.exists():
            return
        try:
            started = json.loads((partial / IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            started = None
        if started != json.loads(json.dumps(self.identity)):
            raise EngineError(f"{partial}: {advice} (it is no unfinished conversion of this checkpoint and config)")

    def needed_bytes(self) -> int:
        """Bytes still to write: those of files that an earlier run finished do not count."""
        finished = _sums(beside(self.path))
        return sum(file.num_bytes for file in self.files if file.name not in finished)

    def free_bytes(self) -> int:
        """Bytes that the disk under the target has left."""
        return shutil.disk_usage(self._home).free

    @property
    def _home(self) -> Path:
        return next(path for path in self.path.absolute().parents if path.exists())

    def write(self, on_written: Callable[[int], None]) -> None:
        """Writes what is not there yet; tells after each file how many bytes of tensors it holds.

        Raises EngineError where it cannot write, or a source is damaged; then nothing is left behind.
        """
        self.check_free()
        needed, free = self.needed_bytes(), self.free_bytes()
        if free < needed:
            raise EngineError(
                f"{self.path}: needs {gigabytes(needed, 1)}, and {self._home} has {gigabytes(free, 1)} left; name "
                "a folder on another disk"
            )
        partial = beside(self.path)
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(f"{partial}: cannot be made ({error.strerror}); name another folder") from None
        try:
            self._write_files(partial, on_written)
            os.rename(partial, self.path)
            flush(self.path.absolute().parent)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"{self.path}: cannot be written ({error}); name another folder") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_files(self, partial: Path, on_written: Callable[[int], None]) -> None:
        _replace(partial / IDENTITY, lambda path: _write_text(path, json.dumps(self.identity, indent=2) + "\n"))
        earlier, checked = _sums(partial), set[Path]()
        sums: dict[str, str] = {}
        for file in self.files:
            place = partial / file.name
            if not (place.is_file() and earlier.get(file.name) == sha256_of(place)):
                for source in file.reads:
                    if source not in checked:
                        check_undamaged(source)
                        checked.add(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                _replace(place, file.write)
                earlier[file.name] = sha256_of(place)
                _append(partial / SUMS, f"{earlier[file.name]}  {file.name}\n")
            sums[file.name] = earlier[file.name]
            on_written(file.num_bytes)
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        _replace(partial / SUMS, lambda path: _write_text(path, lines))


def beside(target: Path) -> Path:
    """Where the target is written before it takes its name."""
    return target.with_name(target.name + ".part")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sums(folder: Path) -> dict[str, str]:
    """The checksums of finished files by name; a line that a kill has cut is none."""
    path = folder / SUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {match[2]: match[1] for line in lines if (match := _SUM.fullmatch(line))}


def _replace(place: Path, write: Callable[[Path], None]) -> None:
    """Lets a file appear whole: written under another name, on disk, then renamed."""
    unfinished = place.with_name(place.name + WRITING)
    write(unfinished)
    flush(unfinished)
    unfinished.replace(place)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _append(path: Path, line: str) -> None:
    """Adds a line behind whole lines."""
    with path.open("a+b") as file:
        file.seek(0)
        text = file.read()
        file.write((b"" if not text or text.endswith(b"\n") else b"\n") + line.encode())
        file.flush()
        os.fsync(file.fileno())
