"""The options of `watch`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.config.options import option


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """A folder that a run writes, and the address of the page."""

    folder: Path = option(
        help='the folder that a run writes or wrote: --watch of the training scripts, "watch" in the section moe_ep',
        positional=True,
        metavar="RUN",
    )
    host: str = option("127.0.0.1", "the address to serve on; another than this machine's own lets others read")
    port: int = option(8765, "the port; 0 takes a free one", least=0, most=65535)
    json: bool = option(False, "print one snapshot as JSON, and serve nothing")
