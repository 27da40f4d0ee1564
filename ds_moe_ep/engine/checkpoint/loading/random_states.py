"""Random states of all ranks travel in a checkpoint: a run that is resumed by as many ranks draws what it would have.

torch's generators, of the host and of the rank's device, and Python's and numpy's. They are taken by a load that
resumes a run: one that loads optimizer states, on as many ranks with experts shared alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.load import MAIN_FILE, folder_to_load
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall, SaveCall
from ds_moe_ep.errors import EngineError

KEY = "moe_ep_random_states"  # in the checkpoint's client state


class RandomStates(EngineCallback):
    """Saves the random states of every rank, and gives them back. Collective over the world."""

    def __init__(self, engine: Any, ep_sizes: Iterable[int]) -> None:
        self._engine, self._ep_sizes = engine, sorted(set(ep_sizes))

    @property
    def _sizes(self) -> list[int]:
        return [dist.get_world_size(), *self._ep_sizes]

    def around_save(self, save: SaveCall, proceed: Callable[[SaveCall], Any]) -> Any:
        states = {"sizes": self._sizes, "ranks": seams.gather(states_of(self._engine.device))}
        return proceed(replace(save, client_state={**(save.client_state or {}), KEY: states}))

    def before_load(self, load: LoadCall) -> None:
        error: EngineError | None = None
        try:
            self._look(load)
        except EngineError as caught:
            error = caught
        seams.settle(error)

    def _look(self, load: LoadCall) -> None:
        folder = folder_to_load(Path(load.load_dir), load.tag)
        if folder is None or not (folder / MAIN_FILE).is_file() or not load.wants_states:
            return
        try:
            main = load_file(folder / MAIN_FILE)
        except EngineError:
            return  # told by those that look at files
        self._mine(main.get(KEY) if isinstance(main, Mapping) else None, str(folder / MAIN_FILE))

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        path, client_state = proceed(load)
        saved = client_state.pop(KEY, None) if client_state else None
        if saved is not None and load.wants_states:
            mine = self._mine(saved, str(path))
            if mine is not None:
                give_back(mine, self._engine.device)
            else:
                seams.log_rank0(
                    f"{path}: random states are of {saved['sizes']} ranks (in all, that share experts); this "
                    f"run has {self._sizes} and goes on with its own"
                )
        return path, client_state

    def _mine(self, saved: Any, path: str) -> Mapping[str, Any] | None:
        """This rank's states in what was saved; None where there are none, or of other sizes.

        Raises EngineError where they are not what this process can take.
        """
        if saved is None:
            return None
        of_ranks = saved.get("ranks") if isinstance(saved, Mapping) else None
        if not isinstance(of_ranks, list | tuple):
            raise EngineError(f"{path}: {KEY} is no list of ranks' random states; take another copy of the file")
        if saved.get("sizes") != self._sizes:
            return None
        mine = of_ranks[dist.get_rank()] if len(of_ranks) == dist.get_world_size() else None
        problem = "is of other ranks" if mine is None else problem_of(mine, states_of(self._engine.device))
        if problem:
            raise EngineError(
                f"{path}: {KEY} {problem}; take another copy of the file, or load_checkpoint(..., "
                "load_optimizer_states=False), which leaves random states as they are"
            )
        return mine


def states_of(device: torch.device) -> dict[str, Any]:
    """Random states of this process as tensors and a few plain values: each of these costs every load of the file."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, values, spare = random.getstate()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": (version, torch.tensor(values), spare)}
    states["numpy"] = (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss)
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state(device)
    return states


def give_back(states: Mapping[str, Any], device: torch.device) -> None:
    """Makes the random states of this process those that were saved."""
    torch.set_rng_state(states["torch"])
    version, values, gauss = states["python"]
    plain = values.tolist() if isinstance(values, Tensor) else values  # as it was saved earlier
    random.setstate((version, tuple(plain), gauss))
    kind, keys, position, has_gauss, spare = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, spare))
    if device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type], device)


def problem_of(saved: Any, own: Mapping[str, Any]) -> str:
    """Why a process with states like `own` cannot take the saved ones, or an empty string."""
    if not isinstance(saved, Mapping) or not {"torch", "python", "numpy"} <= set(saved):
        return "lacks a generator's state"
    for name, state in own.items():
        there = saved.get(name)
        if isinstance(state, Tensor) and there is not None and not _is_like(there, state):
            return f"has a state of {name}'s generator of another size"
    version, values, _ = saved["python"]
    _, keys, *_ = saved["numpy"]
    if version != own["python"][0] or len(values) != len(own["python"][1]) or keys.shape != own["numpy"][1].shape:
        return "has a state of Python's or numpy's generator of another size"
    return ""


def _is_like(saved: Any, own: Tensor) -> bool:
    return isinstance(saved, Tensor) and saved.shape == own.shape and saved.dtype == own.dtype
