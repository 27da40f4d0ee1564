"""The overlap benchmark's schedules and links, for what measures them (bench/) and what simulates them (simulate/).

Links are shaped so that the traffic of a pass takes a ratio of its emulated compute: a pass exchanges rows twice, and
computes once forward and twice backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIKE = {"bit_equal": True}  # all sides make the same products of weight gradients: they differ in what they hide
SCHEDULES: Mapping[str, Mapping[str, Any]] = {  # the benchmark's names of our schedules
    "peers": {"schedule": "peers", **ALIKE},
    "peers, 2 cuts": {"schedule": "peers", "row_cuts": 2, **ALIKE},
    "2 chunks": {"schedule": "chunks", "chunks": 2, **ALIKE},
    "4 chunks": {"schedule": "chunks", "chunks": 4, **ALIKE},
    "8 chunks": {"schedule": "chunks", "chunks": 8, **ALIKE},
    "serial": {"schedule": "serial", **ALIKE},
}
WIRE = "wire"  # serial with experts that take no time
COMPUTES: Mapping[str, int] = {"forward": 1, "backward": 2, "step": 3}  # in emulated forward passes
EXCHANGES: Mapping[str, int] = {"forward": 2, "backward": 2, "step": 4}
HEADERS = 1.08  # bytes on the link over bytes of rows: Ethernet, IP and TCP, acknowledgements of the other way


def link_rate(ratio: float, phase: str, exchange_bytes: float, forward_us: float) -> float:
    """Bytes a microsecond of a node's link over which the traffic of `phase` takes `ratio` times its compute.

    exchanges * exchange_bytes * headers / (ratio * computes * forward_us), where `exchange_bytes` of rows leave a node
    in one exchange and its ranks compute `forward_us` in a forward pass.
    """
    return EXCHANGES[phase] * exchange_bytes * HEADERS / (ratio * COMPUTES[phase] * forward_us)
