"""Two-level dispatch, and copies of experts: which configurations and groups of ranks can have them.

A token whose experts are on a far node crosses to that node once, and is spread inside of it. So the rows that a token
has on one node must lie in one piece of the schedule, and a node is more than the token's own.
"""

from __future__ import annotations

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError

TWO_LEVEL = ("copies", "sums")


def check_replicas(replicas: int | str, others: int) -> None:
    """Raises ConfigError for more slots than other ranks have experts."""
    if isinstance(replicas, int) and replicas > others:
        raise ConfigError(
            f"moe_ep.replicas={replicas}: other ranks have only {others} experts to copy; lower it, or set it to 'auto'"
        )


def check_two_level(two_level: str, replicas: int | str, schedule: str, row_cuts: int) -> None:
    """Raises ConfigError for knobs that two-level dispatch cannot go with."""
    knob = f"moe_ep.two_level={two_level!r}"
    if two_level == "off":
        return
    if replicas:
        raise ConfigError(
            f"{knob} with replicas={replicas!r}: rows of one expert then go to several nodes, and a copy to one of "
            "them; set one of the two to its default"
        )
    if two_level not in TWO_LEVEL:
        return
    if schedule == "chunks" or (schedule == "peers" and row_cuts > 1):
        odd = "schedule='chunks'" if schedule == "chunks" else f"row_cuts={row_cuts}"
        raise ConfigError(
            f"{knob} with {odd}: a token's rows for one node would lie in several pieces, and its copy in one; use the "
            "schedule 'peers' with row_cuts=1, 'serial' or 'auto'"
        )


def check_nodes(two_level: str, top_k: int, schedule: str, peer_group_size: int, torus: Torus) -> None:
    """Raises ConfigError where a layer, whose top_k is its gate's, or its ranks' nodes have no use for two levels."""
    if two_level not in TWO_LEVEL:
        return
    if top_k == 1:
        raise ConfigError(
            f"moe_ep.two_level={two_level!r} with top_k=1: a token has one row, which crosses once as it is; set it to "
            "'off' or raise top_k"
        )
    if torus.num_nodes == 1:
        raise ConfigError(
            f"moe_ep.two_level={two_level!r}: the {torus.size} ranks of an expert group share one node, and no row "
            "crosses to another; set it to 'off' or 'auto' (moe_ep.node_size is the number of ranks per node)"
        )
    if schedule == "peers" and peer_group_size % torus.node_size:
        raise ConfigError(
            f"moe_ep.two_level={two_level!r} with peer_group_size={peer_group_size} on nodes of {torus.node_size} "
            "ranks: a token's rows for one node must lie in one piece; use 0 or a multiple of the node's ranks"
        )
