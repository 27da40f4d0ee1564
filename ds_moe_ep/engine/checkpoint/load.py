"""Checkpoints under another ep_size, or another number of ranks.

Saving and loading are the engine's own: the layer's parameters carry DeepSpeed's names, so its checkpoints are
DeepSpeed's native ones, and experts, one file each, load under any ep_size. Optimizer states do not: DeepSpeed cuts
them by expert-parallel rank and cannot cut them anew. Loaded all the same they would land on the wrong experts, some
of them without a word. Those of ZeRO 1 and 2, of BF16_Optimizer and of no ZeRO are therefore cut anew here
(`reshard.py`, `reshard_plain.py`); others are refused. All that can be refused is, before anything is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.reshard import SavedStates, can_reshard, parts_of, saves_lean
from ds_moe_ep.engine.checkpoint.reshard_plain import PlainRun, can_reshard_plain, plain_states, take_loss_scale
from ds_moe_ep.engine.checkpoint.state_pieces import SavedPieces, StatePart, check_states, take_states
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall
from ds_moe_ep.errors import EngineError, MoEError

MAIN_FILE = "mp_rank_00_model_states.pt"
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")  # layer, expert, model rank
_LOCAL_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")
_OPTIMIZER_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


class SavedEpSize(EngineCallback):
    """Loads optimizer states that were saved under another ep_size or by another number of ranks, or refuses them.

    It raises EngineError before anything is loaded where they cannot be cut anew. Collective over the world.
    """

    def __init__(self, engine: Any, ep_size: int) -> None:
        self._engine, self._ep_size = engine, ep_size

    def _loads_states(self, load: LoadCall) -> bool:
        """True where the experts' optimizer states are loaded as they are cut: a universal checkpoint is cut anew."""
        return load.wants_states and not self._engine.load_universal_checkpoint()

    def before_load(self, load: LoadCall) -> None:
        saved = saved_ep_size(load.load_dir, load.tag) if self._loads_states(load) else None
        if saved is not None and saved != self._ep_size and not reshards(self._engine):
            raise EngineError(
                f"{load.load_dir}: saved with ep_size={saved}, this run has ep_size={self._ep_size}; optimizer states "
                "are cut anew with zero_optimization.stage 0, 1 and 2. Load the weights: "
                "load_checkpoint(..., load_module_only=True)"
            )

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        cut = self._cut_otherwise(load)
        if cut is not None:
            parts, states = self._found(*cut)
            options = {**load.options, "load_optimizer_states": False}
            found = proceed(replace(load, args=(), kwargs=options))
            self._take(parts, states, *cut)
            return found
        try:
            return proceed(load)
        except (KeyError, AttributeError) as error:  # as 0.17 and 0.18 end: they look into a file without states
            if not self._loads_states(load) or self._engine.zero_optimization():
                raise
            raise EngineError(
                f"{load.load_dir}: DeepSpeed {seams.release()} does not load optimizer states of MoE layers without "
                f"ZeRO ({error!r}). Load the weights alone (load_checkpoint(..., load_module_only=True)), train with "
                f"zero_optimization.stage=1, or pip install 'deepspeed>={seams.TESTED[-1]}', which loads this folder"
            ) from error

    def _cut_otherwise(self, load: LoadCall) -> tuple[Path, int] | None:
        """The folder and its ep_size where states were saved under another, or by another number of ranks; else None.

        None too where they cannot be cut anew.
        """
        folder = folder_to_load(Path(load.load_dir), load.tag) if self._loads_states(load) else None
        if folder is None or not reshards(self._engine):
            return None
        saved = saved_ep_size(load.load_dir, load.tag) or self._ep_size
        num_ranks = dist.get_world_size(seams.data_parallel_group())
        is_same = saved == self._ep_size and saved_ranks(folder) in (0, num_ranks)
        has_tensor_ranks = seams.tensor_parallel_size() > 1
        if not is_same and has_tensor_ranks:
            raise EngineError(
                f"{folder}: saved with ep_size={saved} by {saved_ranks(folder)} data-parallel ranks, this run has "
                f"ep_size={self._ep_size} and {num_ranks}: optimizer states beside tensor parallelism are not cut "
                "anew. Load the weights: load_checkpoint(..., load_module_only=True)"
            )
        is_elastic = not has_tensor_ranks and can_reshard(self._engine.optimizer) and saves_lean(folder)
        return None if is_same and not is_elastic else (folder, saved)

    def _found(self, folder: Path, saved: int) -> tuple[list[StatePart], SavedPieces]:
        """This rank's parts of the states, and the pieces in the files that hold all of them. Changes nothing.

        Collective over the world. Raises EngineError on every rank where a rank's parts are not there.
        """
        error: MoEError | None = None
        try:
            parts, states = states_found(self._engine, self._ep_size, folder, saved)
        except MoEError as caught:
            error = caught
        except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as caught:
            error = EngineError(f"{folder}: optimizer states cannot be read ({type(caught).__name__}: {caught})")
        seams.settle(error)
        return parts, states

    def _take(self, parts: Sequence[StatePart], states: SavedPieces, folder: Path, saved: int) -> None:
        """Takes this rank's part of the saved states."""
        optimizer = self._engine.optimizer
        take_states(base_of(optimizer), parts, states)
        for name in ("loss_scaler", "dynamic_loss_scale") if can_reshard(optimizer) else ():
            if name in states.first:
                setattr(optimizer, name, states.first[name])
        take_loss_scale(optimizer, states.first)
        seams.log_rank0(
            f"{folder}: optimizer states of ep_size={saved} were cut anew for ep_size={self._ep_size} on "
            f"{dist.get_world_size()} ranks"
        )


def states_found(engine: Any, ep_size: int, folder: Path, saved: int) -> tuple[list[StatePart], SavedPieces]:
    """This rank's parts of the states that `saved` expert-parallel ranks saved, and the pieces that hold them. Local.

    Raises EngineError where something of them is not there.
    """
    num_experts = {name: int(m.num_experts) for name, m in _moe_layers(engine)}
    stacked = stacked_names(engine)
    is_interleaved = seams.has_data_before_experts(engine)
    num_stages = seams.num_pipeline_stages()
    grid = RankGrid(
        world_size=dist.get_world_size(), ep_size=ep_size, data_before_expert=is_interleaved, num_stages=num_stages
    )
    ep_rank = grid.ep_rank(dist.get_rank())
    model_rank = seams.pipeline_stage() if num_stages > 1 else 0
    states: SavedPieces
    if can_reshard_plain(engine.optimizer):
        run = PlainRun(engine, ep_rank, ep_size, num_experts, stacked, model_rank)
        parts, states = list(run.parts()), plain_states(run, folder, saved)
    else:
        parts = list(parts_of(engine.optimizer, ep_rank, ep_size, num_experts, stacked))
        states = SavedStates(folder, saved, is_interleaved, num_experts, stacked, model_rank)
    check_states(parts, states)
    return parts, states


def base_of(optimizer: Any) -> Any:
    """The optimizer of torch's form in what DeepSpeed wrapped around it, if anything."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def stacked_names(engine: Any) -> frozenset[str]:
    """Names of the parameters that hold all experts of a rank: AutoEP's."""
    stacks = [
        f"{name}.experts.{stack}".removeprefix(".")
        for name, layer in _moe_layers(engine)
        if seams.is_autoep_layer(layer)
        for stack, parameter in layer.experts.named_parameters()
        if parameter.shape[0] == layer.num_local_experts
    ]
    return frozenset(stacks)


def _moe_layers(engine: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in engine.module.named_modules() if seams.is_moe_layer(module)]


def reshards(engine: Any) -> bool:
    """True where the optimizer states of this engine can be cut anew. Local, alike on every rank."""
    return can_reshard(engine.optimizer) or can_reshard_plain(engine.optimizer)


def saved_ranks(folder: Path) -> int:
    """How many data-parallel ranks saved their ZeRO states; 0 where there are none, or the model file is missing."""
    has_states = folder.is_dir() and any("zero_pp_rank_" in path.name for path in folder.glob("*_optim_states.pt"))
    if not has_states or not (folder / MAIN_FILE).is_file():
        return 0
    state = load_file(folder / MAIN_FILE)
    return int(state.get("dp_world_size") or 0)


def folder_to_load(load_dir: Path, tag: str | None, file: str = "latest") -> Path | None:
    """The folder of a tag, or of the one that the file `latest` names; None where nothing is named.

    Raises EngineError for a `latest` that is no text.
    """
    latest = load_dir / file
    if tag is None:
        if not latest.is_file():
            return None
        try:
            tag = latest.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise EngineError(f"{latest}: names no tag ({error}); load_checkpoint(..., tag=...) names one") from None
    return load_dir / str(tag)


def saved_ep_size(load_dir: str, tag: str | None = None) -> int | None:
    """The ep_size of a checkpoint, or None where it does not tell. Reads names and shapes, no weights.

    Without ZeRO there is an optimizer file per expert-parallel rank. With ZeRO the model file lists the parameters of
    one rank, and so the number of experts that it had.
    """
    folder = folder_to_load(Path(load_dir), tag)
    if folder is None:
        return None
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ranks = [int(match[1]) for name in names if (match := _OPTIMIZER_FILE.fullmatch(name))]
    if ranks:
        return max(ranks) + 1
    return _ep_size_by_shapes(folder / MAIN_FILE)


def _ep_size_by_shapes(model_file: Path) -> int | None:
    if not model_file.is_file():
        return None
    state = load_file(model_file)
    for layer in state.get("ds_autoep_layers") or []:  # AutoEP says it
        return int(layer["ep_size"])
    names = [name for group in state.get("param_shapes") or [] for name in group]
    places = [int(match[1]) for name in names if (match := _LOCAL_EXPERT.search(name))]
    num_experts = state.get("num_experts")
    return max(num_experts) // (max(places) + 1) if places and num_experts else None
