"""The functions by which DeepSpeed reads a checkpoint's files, exchanged for one load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from ds_moe_ep.engine import seams

Read = Callable[..., Any]  # of a path, perhaps with map_location


@contextmanager
def reading_by(checkpoints: Any, read: Read) -> Iterator[None]:
    """A scope in which DeepSpeed's checkpoint engine reads by `read`. Local; scopes nest."""
    own = vars(checkpoints).get("load")
    checkpoints.load = read
    try:
        yield
    finally:
        vars(checkpoints).pop("load", None)
        if own is not None:
            checkpoints.load = own


@contextmanager
def unpickling_by(read: Read) -> Iterator[None]:
    """A scope in which DeepSpeed reads by `read(path, map_location, is_mapped)` past its checkpoint engine too. Local.

    The modules that do so, of universal checkpoints for one, and no others, see a torch whose `load` is another.
    """
    with ExitStack() as scopes:
        for name in seams.UNPICKLING & sys.modules.keys():
            scopes.enter_context(patch.object(sys.modules[name], "torch", _TorchWith(read)))
        yield


class _TorchWith:
    """torch, but for its `load`."""

    def __init__(self, read: Read) -> None:
        self.load = lambda path, map_location=None, mmap=False, **_: read(path, map_location, bool(mmap))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
