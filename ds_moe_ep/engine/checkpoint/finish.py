"""The end of a save in the background, for those who read the checkpoint next."""

from __future__ import annotations

from typing import Any

from ds_moe_ep.engine.checkpoint.save import SafeSaver
from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions


def wait_for_saves(engine: Any) -> None:
    """Waits until the last `engine.save_checkpoint` is on disk, where `"async_save"` is true; else it is already.

    Collective over the world. Raises EngineError on every rank where a rank's part failed: the folder of that save does
    not exist then, and what was complete before still is.
    """
    for callback in EngineExtensions.of(engine).callbacks:
        if isinstance(callback, SafeSaver):
            callback.finish()
