"""`watch`: serves the page of a run, or prints one snapshot of it."""

from __future__ import annotations

import json
from collections.abc import Callable

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.live.folder import RunFolder
from ds_moe_ep.live.lines import finite
from ds_moe_ep.live.options import WatchOptions
from ds_moe_ep.live.server import LiveServer
from ds_moe_ep.live.snapshot import snapshot

WAITS_FOR = 'the first report of a run, which --watch of the training scripts or "watch" in the section moe_ep writes'


def run(options: WatchOptions, say: Callable[[str], None]) -> int:
    """Serves until Ctrl-C; with `json` prints one snapshot. Returns 0.

    Raises ConfigError for a folder that is not there and, with `json`, for one in which nothing is written yet.
    """
    folder = RunFolder(options.folder)
    folder.refresh()
    if options.json:
        if not folder.runs:
            raise ConfigError(f"watch={options.folder}: nothing is written yet; it waits for {WAITS_FOR}")
        say(json.dumps(finite(snapshot(folder)), indent=2, allow_nan=False))
        return 0
    with LiveServer(folder, options.host, options.port) as server:
        say(f"{options.folder} on {server.url} until Ctrl-C")
        if not any(run.entries for run in folder.runs.values()):
            say(f"nothing is written yet: the page waits for {WAITS_FOR}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
    return 0
