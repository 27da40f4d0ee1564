"""The function by which an engine reads a checkpoint's files, exchanged for one load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
