"""Checkpoints from outside of an engine: a load that must load, and the end of a save in the background."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ds_moe_ep.engine.checkpoint.save import SafeSaver
from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions
from ds_moe_ep.errors import EngineError


def load_checkpoint(
    engine: Any, folder: str | os.PathLike[str], tag: str | None = None, **options: Any
) -> tuple[Path, dict[str, Any]]:
    """Loads a checkpoint of any ep_size and number of ranks into an engine; its path, and the client state.

    What `engine.load_checkpoint(folder, tag, **options)` does of an engine of `ds_moe_ep.initialize` or
    `attach_overlap`: optimizer states included, nothing guessed, all files looked through before anything is changed.
    Collective over the world. Raises EngineError on every rank for any other engine, whose states of experts would
    come back on other ones, and where there was nothing to load, which DeepSpeed itself tells by a warning.
    """
    if "moe_ep_layers" not in vars(engine):
        raise EngineError(
            f"engine={type(engine).__name__}: DeepSpeed's own load cannot cut optimizer states of experts anew; call "
            "attach_overlap(engine) first, or make the engine with ds_moe_ep.initialize"
        )
    path, state = engine.load_checkpoint(os.fspath(folder), tag, **options)
    if path is None:
        raise EngineError(
            f"{folder}: nothing was loaded, the folder names no tag by `latest`; name a tag, or another one"
        )
    return Path(path), dict(state or {})


def wait_for_saves(engine: Any) -> None:
    """Waits until the last `engine.save_checkpoint` is on disk, where `"async_save"` is true; else it is already.

    Collective over the world. Raises EngineError on every rank where a rank's part failed: the folder of that save does
    not exist then, and what was complete before still is.
    """
    for callback in EngineExtensions.of(engine).callbacks:
        if isinstance(callback, SafeSaver):
            callback.finish()
