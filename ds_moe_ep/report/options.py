"""The report's options, in a file that the command line can read without what the report draws with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.config.options import option


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The files to read and the folder to write."""

    records: tuple[Path, ...] = option(help="files of Records, one line of JSON each", positional=True)
    out: Path = option(
        Path("report"), "where to write (default: report, in this folder)", flags=("-o", "--out"), metavar="FOLDER"
    )
