"""Optimizer states that ZeRO 1 and 2, and DeepSpeed's BF16_Optimizer, cut over the ranks, at another size.

They keep each parameter group as one flat vector, cut over the ranks that hold its parameters. Every file tells which
span of its cut belongs to which parameter. Spans of one parameter stand in the order of the ranks, so each has its
place among the parameter's values: the pieces that `state_pieces` copies from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.state_pieces import SavedPieces, StatePart, StatePiece, global_name
from ds_moe_ep.errors import EngineError

ZERO_FILE = re.compile(r"(?P<prefix>(?:bf16_)?)zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<model_rank>\d+)_optim_states\.pt")
FORMAT = ("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings")
# Attributes of the optimizers' classes: the cuts of the master weights, and the parameters of each group.
OPTIMIZERS = (("single_partition_of_fp32_groups", "bit16_groups"), ("fp32_groups_flat_partition", "bf16_groups"))
_OTHER_FORM = (
    "{}: holds optimizer states in a form that cannot be cut anew ({}); load the weights alone: "
    "load_checkpoint(..., load_module_only=True)"
)
_STEP = "base_optimizer_state_step"
_COMMON = ("_param_slice_mappings", "param_names", "optimizer")


class SavedStates(SavedPieces):
    """The optimizer states of a checkpoint, by parameter. Raises EngineError for files in another form.

    `stacked` names the parameters that hold all experts of a rank; `model_rank` is that of a pipeline.
    """

    def __init__(
        self,
        folder: Path,
        ep_size: int,
        data_before_expert: bool,
        num_experts: Mapping[str, int],
        stacked: Collection[str] = (),
        model_rank: int = 0,
    ) -> None:
        paths = _paths(folder, model_rank)
        files = [states_in(path) for path in paths]
        for path, file in zip(paths, files, strict=True):
            if not is_cut_plainly(file):
                raise EngineError(_OTHER_FORM.format(path, "aligned"))
        grid = RankGrid(world_size=len(files), ep_size=ep_size, data_before_expert=data_before_expert)
        found: dict[str, list[tuple[int, StatePiece]]] = {}
        for rank, file in enumerate(files):
            for name, piece in _pieces_of(file):
                known = name if name in stacked else global_name(name, grid.ep_rank(rank), ep_size, num_experts)
                found.setdefault(known, []).append((grid.ep_rank(rank), piece))
        for name in stacked:  # the experts of all ranks follow each other
            found.get(name, []).sort(key=lambda each: each[0])
        pieces = {name: _with_offsets([piece for _, piece in each]) for name, each in found.items()}
        super().__init__(folder, pieces, files[0], files[0]["base_optimizer_state"])


def _pieces_of(file: Mapping[str, Any]) -> Iterator[tuple[str, StatePiece]]:
    """The pieces in a rank's file, by the names that parameters had there; their offsets are not known yet."""
    base = file["base_optimizer_state"]
    for group, spans in enumerate(file["param_slice_mappings"]):
        state, options = base["state"].get(group, {}), base["param_groups"][group]
        for name, span in spans.items():
            master = file["single_partition_of_fp32_groups"][group]
            yield name, StatePiece(state, options, master, int(span.start), int(span.numel))


def _with_offsets(pieces: list[StatePiece]) -> list[StatePiece]:
    placed: list[StatePiece] = []
    offset = 0
    for piece in pieces:
        placed.append(StatePiece(piece.state, piece.options, piece.master, piece.start, piece.num_values, offset))
        offset += piece.num_values
    return placed


def states_in(path: Path) -> dict[str, Any]:
    """The states in a rank's file. Raises EngineError where they are in another form, or not whole."""
    saved = load_file(path)
    states = saved.get("optimizer_state_dict") if isinstance(saved, Mapping) else None
    states = states if isinstance(states, dict) else {}
    lacking = [name for name in FORMAT if name not in states]
    if lacking:
        raise EngineError(_OTHER_FORM.format(path, ", ".join(lacking)))
    if is_lean(states):
        states["base_optimizer_state"] = _with_groups(states)
    base = states["base_optimizer_state"]
    counts = {len(states[name]) for name in FORMAT[1:]}
    if isinstance(base, Mapping) and (
        not {"state", "param_groups"} <= set(base) or counts != {len(base["param_groups"])}
    ):
        raise EngineError(f"{path}: its parameter groups are not whole; take another copy of the checkpoint")
    return states


def is_lean(states: Mapping[str, Any]) -> bool:
    """True for the states of an elastic checkpoint: one per parameter group, and no options of the groups."""
    return isinstance(states.get("base_optimizer_state"), list | tuple)


def prefix_of(path: Path) -> str:
    """The beginning of the names that DeepSpeed gives to a run's files of ZeRO's states, by one of them."""
    match = ZERO_FILE.fullmatch(path.name)
    return match["prefix"] if match else ""


def saves_lean(folder: Path) -> bool:
    """True where ZeRO's states in a folder are elastic: DeepSpeed loads those of optimizers that count per group."""
    first = next((path for path in sorted(folder.iterdir()) if ZERO_FILE.fullmatch(path.name)), None)
    saved = load_file(first) if first is not None else None
    states = saved.get("optimizer_state_dict") if isinstance(saved, Mapping) else None
    return isinstance(states, Mapping) and is_lean(states)


def _with_groups(states: Mapping[str, Any]) -> dict[str, Any]:
    """Elastic states in torch's form. Of the groups' options there is at most the step."""
    per_group = states["base_optimizer_state"]
    options = {"step": states[_STEP]} if _STEP in states else {}
    return {"state": dict(enumerate(per_group)), "param_groups": [dict(options) for _ in per_group]}


def is_cut_plainly(states: Mapping[str, Any]) -> bool:
    """True for states that lie as their spans say: not those with aligned parameters."""
    is_aligned = any(any(paddings) for paddings in states.get("param_alignment_paddings") or ())
    return isinstance(states["base_optimizer_state"], Mapping) and not is_aligned


def _paths(folder: Path, model_rank: int) -> list[Path]:
    """The files of states by the rank that wrote them. Raises EngineError where one is missing."""
    matches = [(path, match) for path in folder.iterdir() if (match := ZERO_FILE.fullmatch(path.name))]
    found = {int(match["rank"]): path for path, match in matches if int(match["model_rank"]) == model_rank}
    absent = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if absent:
        raise EngineError(f"{folder}: has no optimizer states of rank {absent[0]}; complete the folder")
    return [found[rank] for rank in sorted(found)]


def can_reshard(optimizer: Any) -> bool:
    """True for ZeRO 1 and 2 and for BF16_Optimizer, whose states tell which span belongs to which parameter."""
    is_cut = any(all(hasattr(optimizer, name) for name in (*own, *_COMMON)) for own in OPTIMIZERS)
    return is_cut and not hasattr(optimizer, "fp16_partitioned_groups")


def cuts_of(optimizer: Any) -> tuple[list[Tensor], list[list[Any]]]:
    """This rank's cut of each group's master weights, and the parameters of each group."""
    masters, groups = next(own for own in OPTIMIZERS if hasattr(optimizer, own[0]))
    return getattr(optimizer, masters), getattr(optimizer, groups)


def parts_of(
    optimizer: Any, ep_rank: int, ep_size: int, num_experts: Mapping[str, int], stacked: Collection[str]
) -> Iterator[StatePart]:
    """The part of each parameter's states that this rank keeps. Local."""
    masters, groups = cuts_of(optimizer)
    for group, flat in enumerate(masters):
        by_name = {optimizer.param_names[parameter]: parameter for parameter in groups[group]}
        vector = optimizer.optimizer.param_groups[group]["params"][0]
        for name, span in optimizer._param_slice_mappings[group].items():
            size, here = by_name[name].numel(), by_name[name]._hp_mapping.lp_fragment_address
            is_stacked = name in stacked
            known = name if is_stacked else global_name(name, ep_rank, ep_size, num_experts)
            first, total = (ep_rank * size, ep_size * size) if is_stacked else (0, size)
            yield StatePart(known, group, vector, flat.data, span.start, span.numel, first + here.start, total)
