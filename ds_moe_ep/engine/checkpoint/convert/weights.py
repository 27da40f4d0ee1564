"""Weights carried between layouts: expert parallelism, and tensor x pipeline.

The source's files are mapped, and each weight of the one-device model is found in them: what is missing, left over or
of another shape is refused. The target's files are made from the weights, or shares of them, that lie in them: a
layer's share, an expert, or the dense weights, which DeepSpeed keeps in one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_moe_ep.config.section import SECTION
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.convert.weight_files import WeightFiles, WeightPlace
from ds_moe_ep.engine.checkpoint.load import MAIN_FILE
from ds_moe_ep.errors import EngineError
from ds_moe_ep.parallel.tensor import cut_dimension

Parts = Mapping[str, list[Tensor]]  # the shares of each weight in their order, mapped from the source's files


class StatesOfRanks(Protocol):
    """Optimizer states that lie in the files which tell the state of the run: those of a pipeline's model ranks."""

    def of_run(self, model_rank: int) -> Mapping[str, Any]:
        """Entries of a model rank's file, in memory of their own."""

    def num_bytes(self, model_rank: int) -> int:
        """Bytes of the tensors in them."""


def target_files(
    tag: str,
    source: tuple[Path, WeightFiles],
    target: WeightFiles,
    parts: Parts,
    state: Mapping[str, Any],
    states: StatesOfRanks | None = None,
) -> Iterator[TargetFile]:
    """The files of the target's layout; `source` is the folder of the tag and its files, `state` that of the run."""
    folder, files = source
    holders = files.holders(folder)
    for name, places in target.by_file():
        reads = sorted({path for place in places for path in holders[place.name]})
        num_bytes = sum(bytes_at(place, parts) for place in places)
        write = partial(_write_weights, places, parts, state if name == MAIN_FILE else None)
        yield TargetFile(f"{tag}/{name}", num_bytes, write, tuple(reads))
    if target.is_pipeline:
        for rank, name in enumerate(target.state_files()):
            num_bytes = states.num_bytes(rank) if states is not None else 0
            write = partial(_write_state, rank, state, states)
            yield TargetFile(f"{tag}/{name}", num_bytes, write, (folder / MAIN_FILE,))


def _write_weights(places: list[WeightPlace], parts: Parts, state: Mapping[str, Any] | None, path: Path) -> None:
    weights: dict[str, Any] = {place.key: share_at(place, parts) for place in places}
    torch.save(weights if state is None else {"module": weights, **state}, path)


def _write_state(rank: int, state: Mapping[str, Any], states: StatesOfRanks | None, path: Path) -> None:
    torch.save({"module": None, **state, **(states.of_run(rank) if states is not None else {})}, path)


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
