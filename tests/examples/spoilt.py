"""Shared by tests of the hooking examples: losses as they are printed, and layers that bring results astray."""

from __future__ import annotations

import contextlib
import re
from typing import Any
from unittest import mock


@contextlib.contextmanager
def spoilt(is_spoilt: bool) -> Any:
    """Runs its block with layers that give the first token's result to the second one, and so on."""
    from ds_moe_ep.moe import dispatcher

    def misplaced(*arguments: Any) -> Any:
        return unpermute(*arguments).roll(1, dims=0)

    unpermute = dispatcher.unpermute
    with mock.patch.object(dispatcher, "unpermute", misplaced) if is_spoilt else contextlib.nullcontext():
        yield


def losses_of(printed: str) -> list[float]:
    """The losses that an example prints, step by step."""
    return [float(loss) for loss in re.findall(r"^step \d+ \| loss ([\d.]+)$", printed, re.MULTILINE)]
