"""Where simulated Records come from, and how their numbers and bars become Records and files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import SIMULATED
from ds_moe_ep.records.record import Record, write_whole
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.step.predict import Estimate

NOTE = "simulated, not measured; spread: all ranges of the cluster at their slower and at their faster ends"
COUNTED = "counted from shapes, not measured"


@dataclass(frozen=True, kw_only=True)
class PredictionSource:
    """What all Records of one command have alike; `bed` stands in their names for a test bed's."""

    bed: str
    command: str
    commit: str
    hardware: str

    def record(self, name: str, estimate: Estimate, unit: str, notes: str = NOTE, n: int = 1) -> Record:
        """A number as a Record; its spread is what comes out at both ends of the cluster's ranges."""
        return Record(
            name=name,
            value=estimate.value,
            unit=unit,
            spread=(estimate.low, estimate.high),
            n=n,
            command=self.command,
            commit=self.commit,
            hardware=self.hardware,
            emulated=True,
            notes=notes,
        )


def source_of(cluster: Cluster, path: str, nodes: int | None, command: str, commit: str) -> PredictionSource:
    """The source of what is simulated on a cluster: its bed is named for the file, and for `nodes` where it had others.

    `command` is all of the command line; `commit` is the revision of the sources.
    """
    return PredictionSource(
        bed=SIMULATED + slug(Path(path).stem + (f"_{nodes}_nodes" if nodes is not None else "")),
        command=command,
        commit=commit,
        hardware=f"simulated: {cluster.name} ({cluster.num_nodes} x {cluster.node_size} devices)",
    )


def slug(text: str) -> str:
    """The text as a part of a name: lower case, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "cluster"


def write_out(records: Iterable[Record], path: Path) -> None:
    """Replaces the file that --out names. Raises ConfigError where it cannot be written."""
    try:
        write_whole(records, path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be written ({error}); name a file of your own") from error
