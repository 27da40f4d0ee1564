"""Optimizer states in 16 bits without ZeRO, which DeepSpeed's wrappers keep, in the form of ZeRO's files.

Master weights stand beside torch's states: one per parameter, or one vector per group. A pipeline loads such states
under ZeRO 1 alone: without it DeepSpeed scales no loss of fp16, and does not find those of bf16 that it has written.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.layout_parameters import Listed
from ds_moe_ep.engine.checkpoint.state_pieces import SavedPieces, StatePiece, is_vector
from ds_moe_ep.errors import EngineError

BASE = "optimizer_state_dict"
_MASTERS = ("fp32_groups_flat", "fp32_groups")


def is_wrapped(state: Any) -> bool:
    """True for the state of a 16-bit wrapper of DeepSpeed's."""
    return isinstance(state, Mapping) and BASE in state and any(name in state for name in _MASTERS)


def wrapped_pieces(
    folder: Path, state: Mapping[str, Any], listed: Sequence[Listed], config: Mapping[str, Any]
) -> SavedPieces:
    """The states of one rank by parameter, which lists them in that order; `config` is the target's ds_config.

    Raises EngineError where they are another model's.
    """
    base, is_flat = state[BASE], _MASTERS[0] in state
    rest = list(listed)
    pieces: dict[str, list[StatePiece]] = {}
    for number, options in enumerate(base["param_groups"]):
        masters: Sequence[Tensor] = [state[_MASTERS[0]][number]] if is_flat else state[_MASTERS[1]][number]
        for place, master in zip(options["params"], masters, strict=True):
            own, start = base["state"].get(place, {}), 0
            while start < master.numel() and rest:
                each = rest.pop(0)
                num_values = math.prod(each.shape)
                pieces[each.key] = [StatePiece(own, options, master, start, num_values)]
                start += num_values
            if start != master.numel() or any(is_vector(v) and v.shape != master.shape for v in own.values()):
                raise _of_another_model(folder, f"a master weight of {tuple(master.shape)}")
    if rest:
        raise _of_another_model(folder, f"none of {rest[0].key}")
    first = next(iter(pieces.values()))[0].master
    return SavedPieces(folder, pieces, _as_of_zero(state, first, config), base)


def _of_another_model(folder: Path, found: str) -> EngineError:
    return EngineError(
        f"{folder}: its optimizer has {found}, which the model of the ds_config does not have in that order; give the "
        "model that was saved, or take --weights-only, and load with load_module_only=True"
    )


def _as_of_zero(state: Mapping[str, Any], master: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values beside the states of a rank in the form of ZeRO's; the cuts themselves are the target's."""
    stages = importlib.import_module("deepspeed.runtime.zero.config").ZeroStageEnum
    cuts = ("group_paddings", "param_alignment_paddings", "partition_count", "param_slice_mappings")
    return {
        "loss_scaler": _loss_scaler(state, config),
        "dynamic_loss_scale": bool(state.get("dynamic_loss_scale", False)),
        "overflow": False,
        "base_optimizer_state": state[BASE],
        "single_partition_of_fp32_groups": [master],
        "zero_stage": stages.optimizer_states,
        **dict.fromkeys(cuts),
        "ds_version": importlib.import_module("deepspeed").__version__,
    }


def _loss_scaler(state: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The loss scale of the wrapper, as ZeRO keeps it; what the wrapper does not keep is the ds_config's."""
    scalers = importlib.import_module("deepspeed.runtime.fp16.loss_scaler")
    scale = state.get("cur_scale", 1.0)
    if not state.get("dynamic_loss_scale"):
        return scalers.LossScaler(scale=scale)
    given = config.get("fp16")
    fp16: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    scaler = scalers.DynamicLossScaler(
        init_scale=scale,
        scale_window=state["scale_window"],
        min_scale=fp16.get("min_loss_scale", 1),
        delayed_shift=fp16.get("hysteresis", 2),
        consecutive_hysteresis=fp16.get("consecutive_hysteresis", False),
    )
    for name in ("cur_iter", "last_overflow_iter", "scale_factor"):
        setattr(scaler, name, state[name])
    return scaler
