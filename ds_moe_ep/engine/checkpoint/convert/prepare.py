"""The door of conversions: finds out which one is meant, and refuses what cannot be made before anything is written.

    conversion = prepare("checkpoints/ep16", "checkpoints/ep4", "ds_configs/ep4.json")
    conversion.write()

Optimizer states go along: between sizes of expert parallelism (`resize`), and to and from tensor x pipeline parallelism
(`weights`, `layout_states`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ds_moe_ep.config.section import SECTION, Section, load_ds_config, read_section
from ds_moe_ep.engine.checkpoint.convert import exports, resize, weights
from ds_moe_ep.engine.checkpoint.convert.layout_states import find_states
from ds_moe_ep.engine.checkpoint.convert.layout_targets import (
    PipelineStates,
    expert_states,
    pipeline_states,
    refuse_stage,
)
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile, TargetFolder
from ds_moe_ep.engine.checkpoint.convert.read import SAVING, find_tag, load_file, tags_in
from ds_moe_ep.engine.checkpoint.convert.weight_files import (
    WeightFiles,
    expert_files,
    find_files,
    pipeline_files,
    whole_weights,
)
from ds_moe_ep.engine.checkpoint.load import EXPERT_FILE, MAIN_FILE
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.records.quantity import gigabytes, number

Form = Literal["checkpoint", "hugging_face", "fp32"]
KEPT = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "ds_version")


@dataclass(frozen=True)
class Conversion:
    """A conversion that was found possible."""

    target: TargetFolder
    tag: str
    words: str  # the things carried, from where to where
    way_on: str  # how the target is loaded

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that the target holds: those that several files hold count each time."""
        return sum(file.num_bytes for file in self.target.files)

    def room(self) -> str:
        """The bytes that are still to write beside those that the disk has left, for people."""
        needed, free = self.target.needed_bytes(), self.target.free_bytes()
        rest = (
            f" ({gigabytes(self.num_bytes - needed, 1)} are there from an earlier run)"
            if needed < self.num_bytes
            else ""
        )
        return f"{self.target.path}: needs {gigabytes(needed, 1)}{rest}, {gigabytes(free, 1)} are free"

    def write(self, on_written: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Writes the target's files; tells after each how many bytes of tensors it holds.

        A rerun after a kill goes on where that ended. Raises EngineError where it cannot write, or a file of the source
        is damaged; then, and when it is interrupted, nothing is left behind.
        """
        self.target.write(on_written)

    def __str__(self) -> str:
        num_files = sum(file.name != "latest" for file in self.target.files)
        return (
            f"{self.words}: {number(self.num_bytes / 1e9, significant=3)} GB in {num_files} files of "
            f"{self.target.path} (tag {self.tag!r}); {self.way_on}"
        )


@dataclass(frozen=True)
class _Source:
    """The folder of a tag, and what it is to become."""

    folder: Path
    config: Mapping[str, Any]
    section: Section
    target: Path

    @property
    def tag(self) -> str:
        return self.folder.name


def prepare(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
    tag: str | None = None,
    *,
    to: Form = "checkpoint",
    world_size: int | None = None,
    weights_only: bool = False,
) -> Conversion:
    """The conversion of the checkpoint in `source` to the layout of the ds_config `config`, in a new folder `target`.

    With "layout" in its section it is a pipeline's, else that of expert parallelism, for `world_size` data-parallel
    ranks (by default as many as saved). Optimizer states are carried too, unless `weights_only`. Between sizes of
    expert parallelism the section needs no "model"; with one the weights are checked against it. `tag` is by default
    the one that the file `latest` names. `to` "hugging_face" makes a folder of safetensors, config.json and code of the
    section's "model", "fp32" the weights in fp32 under the names of the model made with ep_size=1, for which no config
    is needed. Reads names, shapes and types, no weights. Raises ConfigError or EngineError
    where the source is not what the model needs or the target is there already.
    """
    if config is None and to != "fp32":
        raise ConfigError("config=null: a conversion needs the ds_config that the target is for; give --config")
    ds_config = load_ds_config(config or {})
    section = read_section(ds_config)
    folder, is_pipeline = Path(source), ds_config.get(SECTION, {}).get("layout") is not None
    tag = find_tag(folder) if tag is None else tag
    found = _Source(folder / tag, ds_config, section, Path(target))
    if not found.folder.is_dir():
        raise EngineError(f"{found.folder}: no such folder; {tags_in(folder)}")
    if found.folder.name.endswith(SAVING):
        raise EngineError(f"{found.folder}: was not saved to the end; {tags_in(folder)}")
    if to == "fp32":
        return _as_fp32(found)
    names = [path.name for path in found.folder.iterdir()]
    is_expert_parallel = any(EXPERT_FILE.fullmatch(name) for name in names) and not is_pipeline and to == "checkpoint"
    if section.model is None and not (is_expert_parallel and not any("-model_" in name for name in names)):
        raise ConfigError(f"{SECTION}.model=null: a conversion needs the model that was saved; name it in the section")
    source_files, parts = None, None
    if section.model is not None:
        source_files = find_files(names, str(found.folder), section.model, section.moe)
        parts = weights.find_parts(found.folder, source_files, whole_weights(section.model, section.moe))
    if to == "hugging_face":
        assert source_files is not None and parts is not None
        return _as_hugging_face(found, source_files, parts)
    if source_files is None or not (source_files.is_pipeline or is_pipeline):
        return _resized(found, world_size, weights_only)
    assert parts is not None and section.model is not None
    return _between_layouts(found, source_files, parts, is_pipeline, world_size, weights_only)


def _between_layouts(
    source: _Source,
    source_files: WeightFiles,
    parts: weights.Parts,
    is_pipeline: bool,
    world_size: int | None,
    weights_only: bool,
) -> Conversion:
    model, moe = source.section.model, source.section.moe
    assert model is not None
    files = pipeline_files(model, moe, source.section.layout) if is_pipeline else expert_files(model, moe)
    saved = load_file(source.folder / MAIN_FILE)
    state = {name: saved[name] for name in KEPT if name in saved}
    # DeepSpeed divides optimizer states by the data-parallel world: of none there are none.
    state |= {"ds_config": source.config, "mp_world_size": files.num_state_files, "dp_world_size": 0}
    if not is_pipeline:
        state["num_experts"] = [moe.num_experts] * model.num_layers
    found = None if weights_only else find_states(source.folder, source_files, model, moe, source.config)
    of_ranks: PipelineStates | None = None
    of_states: list[TargetFile] = []
    if found is not None:
        refuse_stage(found, source.config, is_pipeline)
        if is_pipeline:
            of_ranks = pipeline_states(found, model, moe, source.section.layout, world_size)
            of_states = list(of_ranks.files(source.tag))
        else:
            by_experts = expert_states(found, model, moe, world_size, bool(source.config.get(resize.INTERLEAVED)))
            state |= by_experts.of_run()
            of_states = list(by_experts.files(source.tag))
    targets = list(weights.target_files(source.tag, (source.folder, source_files), files, parts, state, of_ranks))
    carried = f"{len(parts)} weights{' and their optimizer states' * (found is not None)}"
    words = f"{carried} from {source_files.words} to {files.words}"
    return _checkpoint(source, [*targets, *of_states], words, is_whole=found is not None)


def _resized(source: _Source, world_size: int | None, weights_only: bool) -> Conversion:
    checkpoint = resize.ExpertCheckpoint(source.folder)
    moe = source.section.moe
    grid = resize.target_grid(checkpoint, moe.ep_size, source.config, world_size)
    with_states = checkpoint.has_states and not weights_only
    if with_states:
        _check_stage(source, bool(checkpoint.zero_files))
    targets = list(resize.target_files(checkpoint, source.tag, grid, source.config, with_states))
    experts = sum(checkpoint.num_experts.values())
    ranks = f" on {grid.world_size} ranks" if with_states else ""
    carried = "weights and optimizer states" if with_states else "weights"
    words = f"{carried} of {experts} experts in {len(checkpoint.num_experts)} layers to ep_size={grid.ep_size}{ranks}"
    return _checkpoint(source, targets, words, is_whole=with_states)


def _as_fp32(source: _Source) -> Conversion:
    checkpoint = resize.ExpertCheckpoint(source.folder)
    files = list(exports.fp32_files(checkpoint))
    origin = "ZeRO's master weights" if checkpoint.zero_files else "the model's weights"
    words = f"{origin} in fp32, all {sum(checkpoint.num_experts.values())} experts by their global index"
    way_on = "read them with safetensors, and model.load_state_dict(weights) at any ep_size"
    return _conversion(source, files, words, way_on)


def _as_hugging_face(source: _Source, files: WeightFiles, parts: weights.Parts) -> Conversion:
    model, moe = source.section.model, source.section.moe
    assert model is not None
    targets = list(exports.hugging_face_files(source.folder, files, parts, model, moe))
    words = f"{len(parts)} weights from {files.words} to a Hugging Face folder"
    way_on = f"AutoModelForCausalLM.from_pretrained({str(source.target)!r}, trust_remote_code=True) loads it"
    return _conversion(source, targets, words, way_on)


def _check_stage(source: _Source, is_zero: bool) -> None:
    zero = source.config.get("zero_optimization")
    stage = int(zero.get("stage", 0)) if isinstance(zero, Mapping) else None
    if stage is not None and (stage not in (1, 2)) is is_zero:
        raise ConfigError(
            f"zero_optimization.stage={stage}: {source.folder} has optimizer states "
            f"{'of ZeRO 1 or 2, which load with these' if is_zero else 'without ZeRO, which load with stage 0'} "
            "alone; give that stage, or take --weights-only"
        )


def _checkpoint(source: _Source, files: Sequence[TargetFile], words: str, is_whole: bool) -> Conversion:
    latest = TargetFile("latest", 0, partial(_write_text, source.tag))
    option = "" if is_whole else ", load_module_only=True"
    way_on = f"load them with engine.load_checkpoint({str(source.target)!r}{option})"
    return _conversion(source, [*files, latest], words, way_on)


def _conversion(source: _Source, files: Sequence[TargetFile], words: str, way_on: str) -> Conversion:
    folder = TargetFolder(source.target, files, _identity(source, words, files))
    folder.check_free()
    return Conversion(folder, source.tag, words, way_on)


def _identity(source: _Source, words: str, files: Sequence[TargetFile]) -> dict[str, Any]:
    """A conversion as plain values: equal for equal bytes in and the same bytes out."""
    stats = {path.name: path.stat() for path in sorted(source.folder.iterdir()) if path.is_file()}
    config = json.dumps(source.config, sort_keys=True, default=str)
    return {
        "from": str(source.folder.absolute()),
        "carried": words,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "source_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "files": {file.name: file.num_bytes for file in files},
    }


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
