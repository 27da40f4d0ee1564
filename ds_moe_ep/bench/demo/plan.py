"""Plan of the demo: sizes, schedules, and what every rank gets. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUM_NODES, RANKS_PER_NODE = 2, 2
NUM_RANKS = NUM_NODES * RANKS_PER_NODE
NUM_TOKENS, HIDDEN_SIZE = 1024, 384  # of each rank; one expert per token, the experts' load even
# Two passes with two exchanges each; half of the rows of a node's ranks go to the other node, in fp32.
STEP_BYTES = 4 * RANKS_PER_NODE * NUM_TOKENS // 2 * HIDDEN_SIZE * 4
CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "serial": {"schedule": "serial"},
    "overlapped": {"schedule": "peers", "row_cuts": 2},
}
PHASES = ("forward", "backward", "step")
WARM_UPS = 1  # rounds before the measured ones
TIMEOUT_S = 60.0  # of one transfer


@dataclass(frozen=True)
class DemoPlan:
    """One run of the demo; the same on every rank."""

    bytes_per_s: float  # of the link of each node
    compute_ms: float  # emulated, of a rank's experts in a forward pass
    rounds: int
    port: int
    folder: str  # where the ranks of a node find their link
    victim: int | None = None  # the rank that dies in the middle of a pass
