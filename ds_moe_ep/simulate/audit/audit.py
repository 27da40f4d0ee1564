"""The specification's claims: stated, derived, simulated on a cluster, and judged by all three.

The derived column is of the cluster's peak and links; simulated are the specification's two jobs on all of its devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.simulate.audit.runs import Runs, hardware_of
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.specification.claim import Figure, Simulated
from ds_moe_ep.specification.claims import CLAIMS, NOT_STATED
from ds_moe_ep.specification.stated import STATED, Stated

HEAD = ("figure", "section", "stated", "derived", "simulated", "verdict")


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One claim of the audit; nothing is simulated of what only shapes decide."""

    figure: Figure
    simulated: Simulated | None

    @property
    def numbers(self) -> dict[str, Quantity]:
        """The simulated numbers by name."""
        return {number.name: number for number in self.simulated.numbers} if self.simulated else {}

    @property
    def verdict(self) -> str:
        """The verdict on the stated number, from all three columns."""
        added = self.simulated.verdict if self.simulated else ""
        return f"{self.figure.verdict}; simulated: {added}" if added else self.figure.verdict

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, under `HEAD`."""
        figure = self.figure
        text = self.simulated.text if self.simulated else NOT_STATED
        return figure.name, figure.section, figure.stated, figure.derived, text, self.verdict


def audit(cluster: Cluster, stated: Stated = STATED) -> tuple[AuditRow, ...]:
    """Every claim of the specification on a cluster of 16 devices. Raises ConfigError for another number of them."""
    runs, hardware = Runs(cluster), hardware_of(cluster)
    return tuple(
        AuditRow(
            figure=claim.figure(stated, hardware), simulated=claim.simulate(runs, stated) if claim.simulate else None
        )
        for claim in CLAIMS
    )
