"""The expert-parallel layer.

1. Route: scores, top-k, weights, balance losses and counters (`router.py`, `balance.py`).
2. Plan: sort the N = T*K row copies by (destination rank, local expert), exchange counts in one small all-to-all, one
   device-to-host sync for the sizes; none with a capacity (`plan.py`).
3. Permute the rows into send order (`kernels/permute.py`).
4. Run the schedule: send and receive rows, compute experts, send results back, overlapped (`overlap.py`). A shared
   expert computes beside the near rows, under the far ones' transfers.
5. Unpermute and weight the results; add the shared expert's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_moe_ep.comm.lanes import Lanes, make_lanes
from ds_moe_ep.comm.transport import Loopback, Transport
from ds_moe_ep.config import MoEConfig
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.kernels.permute import permute, unpermute
from ds_moe_ep.moe.balance import router_loss
from ds_moe_ep.moe.experts import Experts, SharedExpert
from ds_moe_ep.moe.layout import lay_out
from ds_moe_ep.moe.overlap import Route, run_experts
from ds_moe_ep.moe.plan import DispatchPlan, announce_bad_input, make_plan
from ds_moe_ep.moe.recognise import recognise
from ds_moe_ep.moe.router import Router, Routing
from ds_moe_ep.moe.tuner import Choice, Drift, Trial
from ds_moe_ep.recorder import Off, Recorder
from ds_moe_ep.schedule import Schedule, backward_schedule, forward_schedule
from ds_moe_ep.topology import Torus


@dataclass(frozen=True)
class Links:
    """What ties a layer to its group: the transport, and the schedules over the group's torus.

    The controls are the same pieces at depth 0.
    """

    transport: Transport
    forward: Schedule
    backward: Schedule
    control_forward: Schedule
    control_backward: Schedule

    @classmethod
    def of(cls, config: MoEConfig, transport: Transport, torus: Torus) -> Links:
        configs = (config, replace(config, depth=0))
        schedules = [make(c, torus) for c in configs for make in (forward_schedule, backward_schedule)]
        return cls(transport, *schedules)


class Region(Protocol):
    """The edge around the experts, where `parallel/tensor.py` cuts their width over other ranks."""

    def enter(self, whole: Tensor) -> Tensor:
        """Tokens or weights on their way to the experts."""

    def leave(self, part: Tensor) -> Tensor:
        """The experts' output on its way out."""


class Whole:
    """The region of experts that are whole: nothing happens at its edge."""

    def enter(self, whole: Tensor) -> Tensor:
        return whole

    def leave(self, part: Tensor) -> Tensor:
        return part


class ExpertParallel(nn.Module):
    """A mixture of experts whose experts are shared by the ranks of one group.

    `expert` is a template that is copied for each local expert and maps rows [n, D] to rows [n, D]; `shared` is an
    expert that every token visits, on its own rank. Before its first forward pass a layer with ep_size > 1 needs
    `connect`.
    """

    def __init__(self, hidden_size: int, expert: nn.Module, config: MoEConfig, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.gate = Router(hidden_size, config)
        self.experts = Experts(expert, config.num_local_experts)
        self.shared = shared
        self._shared_form = None if shared is None else recognise(shared)
        self._links = Links.of(config, Loopback(), Torus(1, 1)) if config.ep_size == 1 else None
        self._lanes: Lanes | None = None
        self._device: torch.device | None = None
        self.region: Region = Whole()
        self.recorder: Recorder = Off()
        self.name = ""  # in the record
        self.blocking = False  # runs the control: the same pieces, nothing hidden, the same results bit for bit
        self.last_counts_E = torch.zeros(config.num_experts, dtype=torch.int64)
        self.choice: Choice | None = None  # of the schedule 'auto'
        self._drift = Drift(config.retune_drift)

    def configure(self, config: MoEConfig) -> None:
        """Gives the layer other knobs than it was made with. Local; the number of experts and ep_size stay."""
        own = self.config
        assert (config.num_experts, config.ep_size) == (own.num_experts, own.ep_size), "these shape parameters"
        self.config, self.choice = config, None
        self.gate.configure(config)
        self._drift = Drift(config.retune_drift)
        self._relink()

    @property
    def torus(self) -> Torus:
        """Where the ranks of the layer's group stand; one rank before it is connected."""
        return Torus(1, 1) if self._links is None else self._links.forward.torus

    def take_choice(self, choice: Choice) -> None:
        """Runs the schedule of a choice where the configuration says 'auto'. Local; every rank takes the same one."""
        self.choice = choice
        self._relink()

    def _relink(self) -> None:
        if self._links is not None:
            self._links = Links.of(self._resolved_config(), self._links.transport, self._links.forward.torus)

    def _resolved_config(self) -> MoEConfig:
        """The configuration with the schedule that 'auto' stands for; serial until one is chosen."""
        if self.config.schedule != "auto":
            return self.config
        return replace(self.config, **(self.choice.knobs if self.choice else {"schedule": "serial"}))

    def connect(self, transport: Transport, torus: Torus | None = None) -> None:
        """Gives the layer its links. Local. `torus` places the group's ranks on nodes; by default all share one.

        Raises ConfigError when the group's size is not ep_size.
        """
        if transport.size != self.config.ep_size:
            raise ConfigError(
                f"moe_ep.ep_size={self.config.ep_size}, but the layer is connected to a group of {transport.size} "
                "ranks: pass the group of ep_size ranks that share its experts"
            )
        self._links = Links.of(self._resolved_config(), transport, torus or Torus(1, transport.size))

    def forward(self, x: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [..., D], the weighted balance loss [], and this rank's choices an expert [E] for input [..., D].

        Collective over the expert group, forward and backward: every rank of the group calls it equally often, with
        any number of tokens (with a capacity: the same number). `used_token` [...] is zero for tokens to leave out;
        their output is zero.
        """
        links = self._checked_links(x, used_token)
        x_TD = x.reshape(-1, self.hidden_size)
        routing = self.gate(x_TD, None if used_token is None else used_token.reshape(-1))
        inside = replace(routing, weights_TK=self.region.enter(routing.weights_TK))
        y_TD = self.region.leave(self._dispatch(self.region.enter(x_TD), inside, links))
        loss = router_loss(routing, self.config, links.transport.sum, links.transport.size)
        self.last_counts_E = routing.chosen_TE().sum(0).to(torch.int64)
        return y_TD.view(x.shape), loss, self.last_counts_E

    def _dispatch(self, x_TD: Tensor, routing: Routing, links: Links) -> Tensor:
        row_type = (self.hidden_size, x_TD.dtype)
        sees_drift = self._drift.is_beyond_bound()
        plan = make_plan(routing, self.config.num_experts, links.transport, row_type, sees_drift)
        if self._lanes is None or self._device != x_TD.device:
            self._lanes, self._device = make_lanes(x_TD.device, links.transport.size), x_TD.device
        rows_ND = permute(x_TD, plan.maps)
        shared = None
        if self.shared is not None and self._shared_form is not None:
            shared = SharedExpert(self._shared_form, self.shared, x_TD)
        is_tuned = self.config.schedule == "auto" and links.transport.size > 1
        if is_tuned and self.training and not torch.is_inference_mode_enabled():
            links = self._tune(rows_ND, plan, shared, self._lanes)
        num_shared = 0 if shared is None else len(x_TD)
        layout = lay_out(plan, links.forward.pieces, links.forward.torus, links.transport.rank, num_shared)
        forward, backward = (
            (links.control_forward, links.control_backward) if self.blocking else (links.forward, links.backward)
        )
        recorder = self.recorder if self.training else Off()
        route = Route(layout, forward, backward, links.transport, self._lanes, recorder, self.name)
        results_ND, shared_TD = run_experts(rows_ND, self.experts, route, shared)
        y_TD = unpermute(results_ND, routing.weights_TK, plan.maps)
        if self.shared is None:
            return y_TD
        return y_TD + (self.shared(x_TD) if shared is None else shared_TD)

    def _tune(self, rows_ND: Tensor, plan: DispatchPlan, shared: SharedExpert | None, lanes: Lanes) -> Links:
        """The links to use now: measured anew where there is no choice yet, or where some rank sees drift."""
        assert self._links is not None
        self._drift.see(plan.num_received)
        if self.choice is None or plan.is_drift_seen:
            if shared is not None:
                shared = replace(shared, x_TD=shared.x_TD.detach())
            transport = self._links.transport
            trial = Trial(self.config, rows_ND.detach(), plan, self.experts, transport, self.torus, lanes, shared)
            self.take_choice(trial.choose())
            self._drift.restart()
        return self._links

    def _checked_links(self, x: Tensor, used_token: Tensor | None) -> Links:
        """The layer's links, once the input is known to be fit for it.

        A rank with a bad input first tells its peers, in the exchange of counts that they wait in, and then raises.
        With a capacity on CUDA there is no exchange: its peers wait for rows until the group's time limit.
        """
        if self._links is None:
            raise EngineError(
                f"moe_ep.ep_size={self.config.ep_size}: the layer has no expert-parallel group yet; pass the model "
                "to deepspeed.initialize or ds_moe_ep.initialize, or call the layer's connect(transport)"
            )
        problem = self._problem(x, used_token)
        if problem:
            device = self.gate.wg.weight.device
            if device.type == "cpu" or self.config.capacity(1, self.training) is None:
                announce_bad_input(self._links.transport, self.config.num_local_experts, device)
            raise ConfigError(problem)
        return self._links

    def _problem(self, x: Tensor, used_token: Tensor | None) -> str:
        """What is wrong with an input, or an empty string."""
        dtype = self.experts.dtype or x.dtype
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            return (
                f"input.shape={tuple(x.shape)}: the layer was made for hidden_size={self.hidden_size}; the last "
                "dimension must be that"
            )
        if x.device != self.gate.wg.weight.device:
            return f"input.device={x.device}: the layer is on {self.gate.wg.weight.device}; move the input there"
        if x.dtype != dtype:
            return (
                f"input.dtype={x.dtype}: the experts' parameters are {dtype}; cast the input or the model (inside "
                "torch.autocast, call the layer outside of the region)"
            )
        if used_token is not None and used_token.numel() != x.numel() // self.hidden_size:
            return (
                f"used_token.shape={tuple(used_token.shape)}: holds {used_token.numel()} entries for "
                f"{x.numel() // self.hidden_size} tokens; give one a token"
            )
        return ""
