"""What the command line of `plan` says, of a job and of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_moe_ep.simulate.job.job import Mode


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options by their names there; `command` is all of the command line, to be typed again."""

    config: str
    cluster: str
    command: str
    compare: str | None = None
    micro_batch: int | Literal["largest"] | None = None
    load: str = "even"
    mode: Mode = "training"
    nodes: int | None = None
    sweep: str | None = None
    json: bool = False
    out: Path | None = None
    trace: Path | None = None
