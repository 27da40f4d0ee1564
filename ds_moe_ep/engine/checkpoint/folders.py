"""The folders of checkpoints: how a new one takes an old one's place, and which are complete.

A folder whose name ends in `.saving` is not complete, or was replaced. One that ends in `.old` is a complete one on its
way out, on a filesystem that cannot exchange folders; it is there for the moment of two renames.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.convert.read import OLD, SAVING
from ds_moe_ep.engine.checkpoint.load import EXPERT_FILE, folder_to_load, reshards, saved_ranks
from ds_moe_ep.engine.checkpoint.reshard import ZERO_FILE
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall
from ds_moe_ep.engine.layouts.stages import model_ranks_of_stage
from ds_moe_ep.errors import EngineError, MoEError

RanksOf = Callable[[Path], int]  # how many ranks' optimizer states a folder must hold; 0 looks for none
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")


def publish(partial: Path, folder: Path) -> None:
    """Puts a complete folder in the place of `folder`, which is removed if it exists. Never is there none."""
    if folder.exists():
        exchange(partial, folder)
        remove(partial)
    else:
        partial.rename(folder)
    flush(folder.parent)


def exchange(one: Path, other: Path) -> None:
    """Exchanges the names of two folders: at once on Linux, by three renames on a filesystem that cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    if rename is not None and rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0:
        return
    aside = other.with_name(other.name + OLD)
    remove(aside)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def flush(path: str | Path) -> int:
    """Bytes of a file, or of a folder's names, once on disk: some filesystems find out only then that it is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


def write_latest(save_dir: Path, tag: str) -> None:
    """Lets `latest` name a tag: readers find the old name or the new one, never a part of it."""
    fresh = save_dir / f"latest{SAVING}"
    with fresh.open("w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(save_dir / "latest")
    flush(save_dir)


class IncompleteCheckpoints(EngineCallback):
    """Refuses, on every rank, to load a checkpoint of which files are missing. Collective over the world.

    So it does with a tag that is not there, with checkpoints of which none is named, and where ranks would load
    different ones: DeepSpeed warns and returns None, and a run goes on from nothing.
    `num_experts` has one entry per MoE layer. It raises EngineError before anything is loaded, and names the last
    complete checkpoint of the folder. Universal checkpoints have other files: they are left to DeepSpeed where no
    expert can be mistaken.
    """

    def __init__(self, engine: Any, num_experts: Iterable[int]) -> None:
        self._engine = engine
        self._experts = {(layer, expert) for layer, size in enumerate(num_experts) for expert in range(size)}

    def before_load(self, load: LoadCall) -> None:
        if self._engine.load_universal_checkpoint():
            refuse_universal(self._engine)
            return
        load_dir = Path(load.load_dir)

        def num_ranks(folder: Path) -> int:
            return self._num_ranks(folder) if load.wants_states else 0

        agree(load_dir, *found_by_rank(load_dir, load.tag, self._experts, num_ranks))
        if load.tag is None:
            self._tell_newer(load_dir, num_ranks)

    def _tell_newer(self, load_dir: Path, num_ranks: RanksOf) -> None:
        """A log line where `latest`, a name without a checksum, is not that of the newest complete checkpoint.

        It is loaded all the same: to write an older tag into `latest` is how a run is set back.
        """
        folder = folder_to_load(load_dir, None)
        newest = next(complete_tags(load_dir, self._experts, num_ranks), None) if folder is not None else None
        if folder is not None and newest not in (None, folder.name):
            words = f"{load_dir / 'latest'}: names {folder.name}, which is loaded; {newest} was saved later"
            seams.log_rank0(words, logging.WARNING)

    def _num_ranks(self, folder: Path) -> int:
        """How many ranks' optimizer states must be there: those that were saved, where they can be cut anew."""
        saved = saved_ranks(folder) if reshards(self._engine) else 0
        return saved or dist.get_world_size(seams.data_parallel_group())


def refuse_universal(engine: Any) -> None:
    """Raises EngineError where DeepSpeed's universal checkpoints would give experts the states of others. Local."""
    for name, module in engine.module.named_modules():
        if seams.is_moe_layer(module) and not seams.is_autoep_layer(module) and int(module.ep_size) > 1:
            raise EngineError(
                f"checkpoint.load_universal=true: {name or type(module).__name__} has its experts on {module.ep_size} "
                "ranks, and a universal checkpoint has one set of states per place of an expert on a rank: expert 0 of "
                "every rank would take those of expert 0. Load the folder of save_checkpoint without it, at any ep_size"
            )


def found_by_rank(
    load_dir: Path, tag: str | None, experts: set[tuple[int, int]], num_ranks: RanksOf
) -> tuple[str | None, str]:
    """The tag that this rank would load (None: there is none), and why it cannot, or an empty string. Local."""
    name: str | None = None
    try:
        folder = folder_to_load(load_dir, tag)
        name = folder.name if folder is not None else None
        return name, _problem(load_dir, folder, experts, num_ranks)
    except MoEError as error:
        return name, str(error)
    except OSError as error:
        return name, f"{load_dir}: cannot be read ({type(error).__name__}: {error}); every rank must read it"


def agree(load_dir: Path, name: str | None, problem: str) -> None:
    """Raises EngineError on every rank where one has a problem or would load another tag. Collective."""
    found = seams.gather((name, problem))
    for rank, (_, theirs) in enumerate(found):
        if theirs:
            raise EngineError(f"{theirs} (found by rank {rank})")
    names = [theirs or "nothing" for theirs, _ in found]
    for rank, theirs in enumerate(names):
        if theirs != names[0]:
            raise EngineError(
                f"{load_dir}: rank {rank} would load {theirs}, rank 0 {names[0]}; give all ranks one tag, or folders "
                "with the same file `latest`"
            )


def _problem(load_dir: Path, folder: Path | None, experts: set[tuple[int, int]], num_ranks: RanksOf) -> str:
    """Why a checkpoint cannot be loaded, or an empty string. Without a folder nothing names one."""
    if folder is None:
        return _problem_without_latest(load_dir, experts, num_ranks)
    is_partial = folder.name.endswith(SAVING)
    missing = "it was not saved to the end" if is_partial else missing_files(folder, experts, num_ranks(folder))
    if not missing:
        return ""
    complete = next(complete_tags(load_dir, experts, num_ranks), None)
    if complete is not None:
        return f"{folder}: cannot be loaded, {missing}; load the last complete one with tag={complete!r}"
    aside = folder.with_name(folder.name + OLD)
    hint = f"rename {aside.name} to {folder.name}" if aside.is_dir() else "save one first"
    hint = hint if load_dir.is_dir() else "name the folder that was given to engine.save_checkpoint"
    return f"{folder}: cannot be loaded, {missing}; no complete checkpoint lies beside it: {hint}"


def _problem_without_latest(load_dir: Path, experts: set[tuple[int, int]], num_ranks: RanksOf) -> str:
    """Why a load by `latest` of a folder without it is refused: checkpoints lie there, and none would be loaded.

    Empty where there are none, as before a run's first save: DeepSpeed then returns None and warns.
    """
    if not load_dir.is_dir():
        return ""
    if holds_weights(load_dir):
        parent, name = str(load_dir.absolute().parent), load_dir.absolute().name
        return f"{load_dir}: is one checkpoint, not a folder of them; load_checkpoint({parent!r}, tag={name!r})"
    complete = next(complete_tags(load_dir, experts, num_ranks), None)
    if complete is not None:
        return f"{load_dir}: has no file `latest`, and holds checkpoints; load the newest one with tag={complete!r}"
    partial = sorted(path.name for path in folders_in(load_dir) if holds_weights(path))
    if not partial:
        return ""
    why = missing_files(load_dir / partial[0], experts, 0) or "its files cannot be read"
    return f"{load_dir}: has no file `latest`, and no complete checkpoint ({partial[0]}: {why}); save one first"


def folders_in(load_dir: Path) -> list[Path]:
    """The folders of saves that came to their end."""
    if not load_dir.is_dir():
        return []
    return [path for path in load_dir.iterdir() if path.is_dir() and not path.name.endswith((SAVING, OLD))]


def holds_weights(folder: Path) -> bool:
    """True for a folder with the model's file of some rank."""
    return any(_MODEL_FILE.fullmatch(path.name) for path in folder.iterdir())


def complete_tags(load_dir: Path, experts: set[tuple[int, int]], num_ranks: RanksOf) -> Iterator[str]:
    """The complete checkpoints of a folder, the newest first. A damaged one is passed over."""
    for path in sorted(folders_in(load_dir), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            is_complete = not missing_files(path, experts, num_ranks(path))
        except (MoEError, OSError):
            continue
        if is_complete:
            yield path.name


def missing_files(folder: Path, experts: set[tuple[int, int]], num_ranks: int) -> str:
    """The files that a checkpoint lacks, in words, or an empty string. Reads names alone.

    `experts` has (layer, expert), of the rank's stage in a pipeline, which numbers its layers from 0. With
    `num_ranks` > 0 the optimizer states of so many ranks are looked for, where there are any of ZeRO's.
    """
    if not folder.is_dir():
        return "the folder does not exist"
    names = [path.name for path in folder.iterdir()]
    if not any(_MODEL_FILE.fullmatch(name) for name in names):
        return "it holds no mp_rank_*_model_states.pt"
    mine = model_ranks_of_stage()
    files = [m for name in names if (m := EXPERT_FILE.fullmatch(name))]
    found = {(int(m[1]), int(m[2])) for m in files if mine is None or int(m[3]) in mine}
    lacking = sorted(experts - found)
    if files and lacking:
        layer, expert = lacking[0]
        return f"{len(lacking)} experts' files are missing, layer_{layer}_expert_{expert}_* first"
    ranks = {int(m["rank"]) for name in names if (m := ZERO_FILE.fullmatch(name))}
    absent = sorted(set(range(num_ranks)) - ranks) if ranks else []
    if absent:
        return (
            f"it has no optimizer states of data-parallel rank {absent[0]} of {num_ranks} (saved by fewer ranks, its "
            "weights load with load_module_only=True)"
        )
    return ""
