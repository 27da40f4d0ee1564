"""Carries weights from a checkpoint of one layout to one of another: expert parallelism, and tensor x pipeline.

1. `prepare` maps the source's files into memory without reading them, and finds each weight of the one-device model in
   them: what is missing, left over or of another shape is refused before anything is written.
2. `Conversion.write` makes the target's files one after the other from the weights, or shares of them, that lie in
   them. One file is in memory at a time: a layer's share, an expert, or the dense weights, which DeepSpeed keeps in one
   file. It writes beside the target and renames at the end.

Optimizer states are not carried: ZeRO cuts them flat, by rank. Step counters and the learning rate's are.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.config.section import SECTION, load_ds_config, read_section
from ds_moe_ep.engine.checkpoint.load import MAIN_FILE
from ds_moe_ep.engine.checkpoint.weight_files import (
    WeightFiles,
    WeightPlace,
    expert_files,
    find_files,
    pipeline_files,
    whole_weights,
)
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.parallel.tensor import cut_dimension
from ds_moe_ep.records.quantity import gigabytes, number

KEPT = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "ds_version")


@dataclass(frozen=True)
class Conversion:
    """A conversion that was found possible. `parts` has the shares of each weight, mapped from the source's files."""

    source: Path
    target: Path
    tag: str
    source_files: WeightFiles
    target_files: WeightFiles
    parts: Mapping[str, list[Tensor]]
    state: Mapping[str, Any]  # of the run, as every state file tells it

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that will be written: those that every rank of a tensor group holds count each time."""
        return sum(bytes_at(place, self.parts) for place in self.target_files.places)

    def write(self, on_written: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Writes the target's files; tells after each how many bytes of weights it holds.

        Raises EngineError where it cannot write; then, and when it is interrupted, nothing is left behind.
        """
        self._check_space()
        unfinished = beside(self.target)
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise EngineError(f"{unfinished}: cannot be made ({error.strerror}); name another folder") from None
        try:
            (unfinished / self.tag).mkdir(parents=True)
            self._write_files(unfinished / self.tag, on_written)
            (unfinished / "latest").write_text(self.tag)
            os.rename(unfinished, self.target)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter
            shutil.rmtree(unfinished, ignore_errors=True)
            raise EngineError(f"{self.target}: cannot be written ({error}); name another folder") from error
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _check_space(self) -> None:
        home = next(path for path in self.target.absolute().parents if path.exists())
        free = shutil.disk_usage(home).free
        if free < self.num_bytes:
            raise EngineError(
                f"{self.target}: needs {gigabytes(self.num_bytes, 1)}, and {home} has {gigabytes(free, 1)} left; name "
                "a folder on another disk"
            )

    def _write_files(self, folder: Path, on_written: Callable[[int], None]) -> None:
        files = self.target_files
        for name, places in files.by_file():
            weights: dict[str, Any] = {place.key: share_at(place, self.parts) for place in places}
            torch.save({"module": weights, **self.state} if name == MAIN_FILE else weights, folder / name)
            on_written(sum(bytes_at(place, self.parts) for place in places))
        if files.is_pipeline:
            for name in files.state_files():
                torch.save({"module": None, **self.state}, folder / name)

    def __str__(self) -> str:
        files = self.target_files
        num_files = len({place.file for place in files.places} | set(files.state_files()))
        return (
            f"{len(self.parts)} weights from {self.source_files.words} to {files.words}: "
            f"{number(self.num_bytes / 1e9, significant=3)} GB in {num_files} files of {self.target} "
            f"(tag {self.tag!r}); load them with engine.load_checkpoint({str(self.target)!r}, load_module_only=True)"
        )


def prepare(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any],
    tag: str | None = None,
) -> Conversion:
    """The conversion of the checkpoint in `source` to the layout of the ds_config `config`, in a new folder `target`.

    With "layout" in its section it is a pipeline's, else that of expert parallelism. `tag` is by default the one that
    the file `latest` names. Reads names, shapes and types, no weights. Raises ConfigError or EngineError where the
    source is not what the model needs or the target is there already.
    """
    source, target = Path(source), Path(target)
    ds_config = load_ds_config(config)
    section = read_section(ds_config)
    if section.model is None:
        raise ConfigError(f"{SECTION}.model=null: a conversion needs the model that was saved; name it in the section")
    for path in (target, beside(target)):
        if path.exists():
            raise EngineError(f"{path}: exists, and a conversion overwrites nothing; remove it or name another folder")
    tag = find_tag(source) if tag is None else tag
    folder = source / tag
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder; {tags_in(source)}")
    model, moe = section.model, section.moe
    is_pipeline = ds_config[SECTION].get("layout") is not None
    target_files = pipeline_files(model, moe, section.layout) if is_pipeline else expert_files(model, moe)
    source_files = find_files((path.name for path in folder.iterdir()), str(folder), model, moe)
    parts = find_parts(folder, source_files, whole_weights(model, moe))
    saved = load_file(folder / MAIN_FILE)
    state = {name: saved[name] for name in KEPT if name in saved}
    # DeepSpeed divides optimizer states by the data-parallel world: of none there are none.
    state |= {"ds_config": ds_config, "mp_world_size": target_files.num_state_files, "dp_world_size": 0}
    if not is_pipeline:
        state["num_experts"] = [moe.num_experts] * model.num_layers
    return Conversion(source, target, tag, source_files, target_files, parts, state)


def find_tag(source: Path) -> str:
    """The tag that the file `latest` names."""
    try:
        return (source / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{source / 'latest'}: cannot be read ({error}); {tags_in(source)}") from None


def tags_in(source: Path) -> str:
    """The way out for a tag that is missing."""
    tags = sorted(path.name for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    known = f"choose a tag of {', '.join(tags)}, or " if tags else ""
    return f"{known}name the folder that was given to engine.save_checkpoint"


def find_parts(folder: Path, files: WeightFiles, whole: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The shares of each weight in their order, mapped from the files. `whole` has the model's shapes.

    Raises EngineError where a weight is missing, left over, or not as the model has it.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in whole}
    for name, places in files.by_file():
        path = folder / name
        weights = load_file(path)
        weights = weights.get("module") if name == MAIN_FILE else weights
        check_keys(path, weights, {place.key for place in places})
        for place in places:
            check_weight(path, place, weights[place.key], place.of(whole[place.name]), parts[place.name])
            parts[place.name].append(weights[place.key])
    lacking = [name for name, found in parts.items() if not found]
    if lacking:
        raise EngineError(
            f"{folder}: of {files.words}, which has no {lacking[0]}; give a ds_config of a model without it"
        )
    return parts


def check_keys(path: Path, weights: Any, planned: set[str]) -> None:
    """Raises EngineError where a file does not hold the planned weights, or holds others."""
    if not isinstance(weights, Mapping):
        raise EngineError(f"{path}: holds a {type(weights).__name__} and no weights; save the checkpoint again")
    for wrong, what in ((planned - set(weights), "lacks"), (set(weights) - planned, "has left over")):
        if wrong:
            raise EngineError(
                f"{path}: {what} {len(wrong)} weights, {sorted(wrong)[0]} first: another model, or another "
                f"{SECTION}.balance, was saved; give its ds_config"
            )


def check_weight(path: Path, place: WeightPlace, found: Any, planned: Tensor, earlier: list[Tensor]) -> None:
    """Raises EngineError where a weight is not as the model has it, or of another type than its earlier shares."""
    if not isinstance(found, Tensor) or found.shape != planned.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise EngineError(
            f"{path}: {place.key} is {shape}, and the model of the ds_config has {tuple(planned.shape)} there; give "
            "the ds_config of the model that was saved"
        )
    if earlier and found.dtype != earlier[0].dtype:
        raise EngineError(
            f"{path}: {place.key} is {found.dtype}, another rank's share {earlier[0].dtype}; save the checkpoint again"
        )


def load_file(path: Path) -> Any:
    """The content of a checkpoint's file, with its tensors mapped and not read.

    Only tensors, plain values and DeepSpeed's own small classes are made: a file of unknown origin runs no code.
    """
    if not path.is_file():
        raise EngineError(f"{path}: no such file; complete the folder")
    if not zipfile.is_zipfile(path):
        raise EngineError(f"{path}: is cut off, or no file of torch.save in its zip form; save the checkpoint again")
    try:
        with torch.serialization.safe_globals(deepspeeds_classes()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "something that is no tensor"
        raise EngineError(
            f"{path}: holds {what}, and making it could run code of the file's; save the checkpoint again without it "
            "(a client_state of plain values and tensors)"
        ) from error
    except Exception as error:
        raise EngineError(f"{path}: cannot be read ({type(error).__name__}: {error}); save it again") from error


def deepspeeds_classes() -> list[Any]:
    """The classes that DeepSpeed itself puts into files of a checkpoint; those of them that the release has."""
    homes = {
        "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
        "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
        "deepspeed.utils.tensor_fragment": ("fragment_address",),
    }
    modules = ((importlib.import_module(module), names) for module, names in homes.items())
    return [getattr(module, name) for module, names in modules for name in names if hasattr(module, name)]


def share_at(place: WeightPlace, parts: Mapping[str, list[Tensor]]) -> Tensor:
    """The share of a weight that belongs to `place`, in memory of its own.

    Of weights that every rank of a tensor group holds whole, the first rank's counts.
    """
    shares, dimension = parts[place.name], cut_dimension(place.name)
    whole = shares[0] if dimension is None or len(shares) == 1 else torch.cat(shares, dimension)
    return place.of(whole).clone(memory_format=torch.contiguous_format)


def bytes_at(place: WeightPlace, parts: Mapping[str, list[Tensor]]) -> int:
    """Bytes of the share of a weight that belongs to `place`."""
    shares, is_cut = parts[place.name], cut_dimension(place.name) is not None
    return shares[0].nbytes * len(shares) // place.share.count if is_cut else shares[0].nbytes


def beside(target: Path) -> Path:
    """Where the target is written before it takes its name."""
    return target.with_name(target.name + ".part")
