"""Connection of a layer to its group: the transport, and the schedules over the group's torus."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ds_moe_ep.comm.callbacks import WithCallbacks
from ds_moe_ep.comm.open import check_near_lanes
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.two_level.copies import TwoLevel
from ds_moe_ep.schedule.build import Schedule, backward_schedule, forward_schedule


@dataclass(frozen=True)
class Connection:
    """The transport and the schedules of a layer.

    The controls are the same pieces at depth 0.
    """

    transport: Transport
    forward: Schedule
    backward: Schedule
    control_forward: Schedule
    control_backward: Schedule
    two_level: TwoLevel | None = None  # where plans need copies, for a schedule that sends them or may come to do so

    @classmethod
    def of(cls, config: MoEConfig, transport: Transport, torus: Torus) -> Connection:
        control = replace(config, depth=0)
        schedules = forward_schedule(config, torus), backward_schedule(config, torus)
        controls = forward_schedule(control, torus), backward_schedule(control, torus)
        return cls(transport, *schedules, *controls, _two_level(config, transport, torus))

    @property
    def num_nodes(self) -> int:
        """Nodes whose copies are told in the exchange of counts; 0 with one level."""
        return 0 if self.two_level is None else self.two_level.torus.num_nodes

    @cached_property
    def text(self) -> str:
        """The schedules as text: equal on two ranks where the schedules are."""
        return f"{self.forward} {self.backward}"


def may_copy(config: MoEConfig, transport: Transport, torus: Torus) -> bool:
    """True where "auto" may send copies: there are far nodes, several rows per token, and no callback on the way."""
    has_callbacks = isinstance(transport, WithCallbacks)
    return config.two_level != "off" and torus.num_nodes > 1 and config.top_k > 1 and not has_callbacks


def _two_level(config: MoEConfig, transport: Transport, torus: Torus) -> TwoLevel | None:
    """The nodes of a group whose plans need copies. Raises ConfigError where its links cannot carry them."""
    if config.two_level == "off" or torus.num_nodes == 1:
        return None
    if config.two_level == "auto" and not may_copy(config, transport, torus):
        return None
    check_near_lanes(transport, config.two_level)
    if isinstance(transport, WithCallbacks):
        raise ConfigError(
            f"moe_ep.two_level={config.two_level!r} with transfer callbacks: a copy has its routes in the bytes behind "
            "it, which a callback might round; set it to 'off', or remove the callbacks"
        )
    return TwoLevel(torus, config.two_level == "sums")
