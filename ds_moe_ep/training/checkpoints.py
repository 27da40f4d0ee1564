"""Where a run keeps its checkpoints: tried before the first step, and written every so often and at the end."""

from __future__ import annotations

import argparse
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

from ds_moe_ep import ConfigError, Section, wait_for_saves
from ds_moe_ep.config.training import Training
from ds_moe_ep.engine.seams import gather
from ds_moe_ep.records.quantity import gigabytes
from ds_moe_ep.sizing.footprint import count_parameters, memory_of_rank


def checkpoint_bytes(section: Section, training: Training) -> int:
    """Bytes of a whole checkpoint: every weight and its optimizer states once."""
    assert section.model is not None
    weights = count_parameters(section.model, section.moe).total
    whole = memory_of_rank(training, weights, weights, activations=0, step=0)
    return whole.weights + whole.optimizer + whole.host_optimizer


def check_room(folder: str, num_bytes: int) -> None:
    """Raises ConfigError on every rank where a host has less free than its ranks write of a checkpoint. Collective.

    Hosts may write to one disk: what does not fit one host's ranks cannot fit at all.
    """
    free = gather((socket.gethostname(), shutil.disk_usage(folder).free))
    for host, num_ranks in Counter(host for host, _ in free).items():
        most, needed = max(size for name, size in free if name == host), num_bytes * num_ranks // len(free)
        if most < needed:
            raise ConfigError(
                f"--save={folder}: {host} has {gigabytes(most)} free there, and its {num_ranks} ranks write about "
                f"{gigabytes(needed)} of a checkpoint; make room or name another folder"
            )


class Checkpoints:
    """The checkpoints of a run: every `--save-every` steps, and the last one. Saving is collective."""

    def __init__(self, engine: Any, args: argparse.Namespace) -> None:
        self._engine, self._folder, self._every = engine, args.save, args.save_every
        self._saved_at = engine.global_steps if args.resume and same(args.resume, args.save) else None

    def finish(self) -> None:
        """Saves the last step, and waits until it is on disk."""
        self.save()
        wait_for_saves(self._engine)

    def after_step(self) -> None:
        """Saves where it is time to."""
        if self._every and self._engine.global_steps % self._every == 0:
            self.save()

    def save(self) -> None:
        """Saves what was not saved yet, where a folder is named."""
        if self._folder and self._saved_at != self._engine.global_steps:
            self._engine.save_checkpoint(self._folder)
            self._saved_at = self._engine.global_steps


def same(one: str, other: str | None) -> bool:
    """True where two names are of one folder."""
    return other is not None and Path(one).resolve() == Path(other).resolve()


def check_resume(folder: str, name: str) -> None:
    """Raises ConfigError where no checkpoint of DeepSpeed's lies in the folder that the option `name` gives."""
    latest = Path(folder) / "latest"
    if not latest.is_file():
        raise ConfigError(f"{name}={folder}: no DeepSpeed checkpoint there; name the folder that was given to --save")
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or not (Path(folder) / tag).is_dir():
        there = ", ".join(sorted(path.name for path in Path(folder).glob("global_step*") if path.is_dir()))
        way_out = f"write one that is into it ({there})" if there else "restore the folder"
        raise ConfigError(f"{name}={folder}: its file `latest` names {tag or 'nothing'}, which is not there; {way_out}")
