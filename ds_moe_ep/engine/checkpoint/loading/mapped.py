"""Files of a checkpoint are mapped into memory while DeepSpeed loads them, in the place of being read whole.

DeepSpeed collects all weights of a rank's experts, and its optimizer states, before it copies them: as much again as
the rank keeps. Mapped, their pages belong to the files and go when memory is needed. torch's optimizers keep the
tensors that they are given: they get the ones that they have, filled, so that no file stays mapped behind the load.

DeepSpeed would unpickle anything. Here a file is read as tensors and plain values alone once more, by the rule of the
preflight: a file that took the place of the one that was looked through runs nothing either. The files of a universal
checkpoint, each with a parameter's state of one kind, are read by that rule too.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine import step_seams
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.loading.reading import reading_by, unpickling_by
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall

COPIED = ("module", "optimizer", "frozen_param_fragments")  # of a file with weights: what DeepSpeed copies, or we do


class MappedFiles(EngineCallback):
    """Lets the engine read its checkpoints without a second copy in memory, as tensors and plain values. Local."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        checkpoints = self._engine.checkpoint_engine
        if type(checkpoints).__name__ != "TorchCheckpointEngine":
            return proceed(load)
        is_private = torch.serialization.get_default_mmap_options() == mmap.MAP_PRIVATE

        def load_mapped(path: Any, map_location: Any = None) -> Any:
            return _kept(load_file(Path(path), map_location, is_mapped=is_private))

        optimizer = step_seams.torch_optimizer(self._engine)
        filling = optimizer.register_load_state_dict_pre_hook(filled) if optimizer is not None else nullcontext()
        with reading_by(checkpoints, load_mapped), unpickling_by(load_as_asked), filling:
            return proceed(load)


def load_as_asked(path: Any, map_location: Any, is_mapped: bool) -> Any:
    """The content of a file that DeepSpeed reads by itself, mapped where it says so."""
    return load_file(Path(path), map_location, is_mapped)


def _kept(found: Any) -> Any:
    """The content of a file; what others may keep, a client state for one, has memory of its own."""
    if not (isinstance(found, dict) and "module" in found):
        return found
    return {name: value if name in COPIED else _own(value) for name, value in found.items()}


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {name: _own(each) for name, each in value.items()}
    return type(value)(map(_own, value)) if type(value) in (list, tuple) else value


@torch.no_grad()
def filled(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
    """A pre-hook of `load_state_dict`: the saved state in the tensors that the optimizer has, or in copies.

    It leaves alone what torch refuses: states of other parameters.
    """
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in saved["param_groups"] for place in group["params"]]
    if len(own) != len(places):
        return None
    states = dict(saved["state"])
    for place, parameter in zip(places, own, strict=True):
        before = optimizer.state.get(parameter, {})
        if place in states:
            states[place] = {kind: _filled(before.get(kind), value) for kind, value in states[place].items()}
    return {**saved, "state": states}


def _filled(own: Any, saved: Any) -> Any:
    if not isinstance(saved, Tensor):
        return saved
    if isinstance(own, Tensor) and own.shape == saved.shape and own.dtype == saved.dtype:
        return own.copy_(saved)
    return saved.clone()
