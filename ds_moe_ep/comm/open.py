"""Opens the transport that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from ds_moe_ep.comm.automatic import Automatic
from ds_moe_ep.comm.collective import Collective
from ds_moe_ep.comm.group_transport import GroupTransport
from ds_moe_ep.comm.lane_groups import LaneGroups, open_lanes
from ds_moe_ep.comm.pairwise import Pairwise
from ds_moe_ep.comm.transport import NEAR_LANES, REPLICAS, Loopback, Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.health.watch import Watch


def open_transport(groups: Sequence[Sequence[int]], config: MoEConfig, watch: Watch | None = None) -> Transport:
    """The transport of this rank's expert-parallel group, on new communicators.

    Collective over the world: every rank passes the same groups of global ranks, which partition the world. Groups of
    one rank get a loopback and open nothing. Without a watch of the caller's (`open_watch`) the transport has its own.
    """
    if all(len(group) == 1 for group in groups):
        return Loopback()
    extra = {"with_replicas": bool(config.replicas), "with_near": config.two_level != "off"}
    return transport_over(open_lanes(groups, config.timeout_s, watch, config.max_ctas, **extra), config)


def transport_over(lanes: LaneGroups, config: MoEConfig) -> Transport:
    """The transport that `config` names over communicators that exist. Local."""
    kinds: dict[str, type[Pairwise | Collective]] = {
        "auto": Automatic,
        "pairwise": Pairwise,
        "collective": Collective,
    }
    return kinds[config.transport](lanes, config.timeout_s)


def check_near_lanes(transport: Transport, two_level: str) -> None:
    """Raises ConfigError where a transport was opened without the communicators of two-level dispatch."""
    if isinstance(transport, GroupTransport) and NEAR_LANES[0] not in transport.groups.lanes:
        raise ConfigError(
            f"moe_ep.two_level={two_level!r}: the layer's {type(transport).__name__} has no communicators for rows "
            "inside of a node; open it by open_transport with a configuration that has the knob, or set it to 'off'"
        )


def link_of_replicas(transport: Transport, replicas: int | str) -> Transport:
    """The link of weights and gradients of replicated experts beside a transport, a communicator of its own. Local.

    Raises ConfigError where the transport was opened without one.
    """
    if not isinstance(transport, GroupTransport) or REPLICAS not in transport.groups.lanes:
        raise ConfigError(
            f"moe_ep.replicas={replicas!r}: the layer's {type(transport).__name__} has no communicator for replicas; "
            "open it by open_transport with a configuration that has them, or set replicas to 0"
        )
    return Pairwise(transport.groups, transport.timeout_s)
