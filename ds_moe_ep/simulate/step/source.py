"""Origin of simulated Records, and the files that they go into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import SIMULATED
from ds_moe_ep.records.provenance import Provenance, command, commit
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.records.record import Record, write_whole
from ds_moe_ep.simulate.cluster.cluster import Cluster

NOTE = "simulated, not measured; spread: all ranges of the cluster at their slower and at their faster ends"
COUNTED = "counted from shapes, not measured"


@dataclass(frozen=True, kw_only=True)
class PredictionSource(Provenance):
    """Origin of all Records of one simulation; `environment` stands in their names for a test bed's."""

    environment: str
    emulated: bool = True

    def record(self, quantity: Quantity, start: str = "", notes: str = NOTE) -> Record:
        """A Quantity as a Record; its spread is what comes out at both ends of the cluster's ranges."""
        return super().record(quantity, start, notes)

    def records(self, start: str, quantities: Iterable[Quantity]) -> Iterator[Record]:
        """A Record of each."""
        return (self.record(quantity, start) for quantity in quantities)


def source_of(cluster: Cluster, path: str, words: Sequence[str], nodes: int | None = None) -> PredictionSource:
    """The source of a command line's Records: its environment is named for the cluster's file, and for its `nodes`."""
    return PredictionSource(
        environment=SIMULATED + slug(Path(path).stem + (f"_{nodes}_nodes" if nodes is not None else "")),
        command=command("ds_moe_ep", words),
        commit=commit(),
        hardware=f"simulated: {cluster.name} ({cluster.num_nodes} x {cluster.node_size} devices)",
    )


def slug(text: str) -> str:
    """The text as a part of a name: lower case, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "cluster"


def write_out(records: Iterable[Record], path: Path | None) -> None:
    """Replaces the file that --out names, if it names one. Raises ConfigError where it cannot be written."""
    try:
        write_whole(records, path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be written ({error}); name a file of your own") from error
