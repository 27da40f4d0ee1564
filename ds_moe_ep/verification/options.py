"""The options of the command, in a file that the command line can read without what the command needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.config.options import option


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The command line's values."""

    script: str = option(help="the training script; it runs until two steps are verified", metavar="FILE")
    config: str | None = option(None, "a ds_config in place of the one that the script passes", metavar="DS_CONFIG")
    ranks: int | None = option(None, "ranks to start on this machine; outside of a launcher's job", least=1)
    checkpoint: bool = option(True, "save and load no checkpoint")
    folder: str | None = option(None, "where the checkpoint is saved and removed; all ranks see it", metavar="FOLDER")
    limit: float = option(1800.0, "seconds that ranks started here may take", above=0, metavar="SECONDS")
    out: Path | None = option(None, "a file for the verdicts as JSON", metavar="FILE")
    json: bool = option(False, "print JSON instead of a table")
    arguments: tuple[str, ...] = option(
        (), "the script's own arguments, behind --", metavar="ARGUMENTS", positional=True, rest=True
    )
