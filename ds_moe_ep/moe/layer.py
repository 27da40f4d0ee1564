"""The expert-parallel layer.

1. Route: scores, top-k, weights, balance losses and counters (`router.py`, `balance.py`).
2. Dispatch: the rows go to their experts and come back weighted (`dispatcher.py` tells it in its steps).
3. Add the shared expert's outputs where there is one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.eager import not_compiled
from ds_moe_ep.moe.balance import Batch, router_loss
from ds_moe_ep.moe.dispatcher import Dispatcher
from ds_moe_ep.moe.experts import (
    Experts,
    OpaqueExperts,
    autocast_type,
    first_parameter,
    local_experts,
    shared_expert,
)
from ds_moe_ep.moe.match_expert import ExpertForms
from ds_moe_ep.moe.replicas.found_experts import known_or_refused
from ds_moe_ep.moe.router import Router
from ds_moe_ep.moe.routes import Routing
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks


class Region(Protocol):
    """The edge around the experts, where `parallel/tensor.py` cuts their width over other ranks."""

    def copy_to_tp(self, whole: Tensor) -> Tensor:
        """Tokens or weights on their way to the experts."""

    def reduce_from_tp(self, part: Tensor) -> Tensor:
        """The experts' output on its way out."""


class Whole:
    """The region of experts that are whole: nothing happens at its edge."""

    def copy_to_tp(self, whole: Tensor) -> Tensor:
        return whole

    def reduce_from_tp(self, part: Tensor) -> Tensor:
        return part


class ExpertParallel(nn.Module):
    """A mixture of experts whose experts are shared by the ranks of one group.

    `expert` is a template that is copied for each local expert and maps rows [n, D] to rows [n, D]; `shared` is an
    expert that every token visits, on its own rank. Before its first forward pass a layer with ep_size > 1 needs
    `connect`.

    copy.deepcopy gives a layer with parameters of its own on the same links: all ranks of the group call it alike, as
    any layer. A pickled layer comes back without links, and needs `connect` again.
    """

    router_class: type[Router] = Router
    adds_residual = True  # its forward takes `residual`; whoever holds a layer of any kind can ask

    def __init__(self, hidden_size: int, expert: nn.Module, config: MoEConfig, shared: nn.Module | None = None) -> None:
        nn.Module.__init__(self)  # a subclass may inherit from another layer's class too, whose constructor builds it
        self.hidden_size = hidden_size
        self.gate = self.router_class(hidden_size, config)
        self.experts = Experts(expert, config.num_local_experts)
        self.shared = shared
        self._shared_forms = ExpertForms()
        self.region: Region = Whole()
        self.tensor_ranks = TensorRanks()
        self.dispatcher = Dispatcher(config)
        self.last_counts_E = torch.zeros(config.num_experts, dtype=torch.int64)

    @property
    def config(self) -> MoEConfig:
        """The layer's knobs as they are in force."""
        return self.dispatcher.config

    @property
    def _device(self) -> torch.device:
        """The device of the gate, and so of the layer."""
        wg = self.gate.wg
        weight = getattr(wg, "weight", None)  # parameters() takes ten times as long
        return weight.device if isinstance(weight, Tensor) else next(wg.parameters()).device

    def configure(self, config: MoEConfig) -> None:
        """Gives the layer other knobs than it was made with. Local; the number of experts and ep_size stay."""
        self.gate.configure(config)
        self.dispatcher.configure(config)

    def connect(self, transport: Transport, torus: Torus | None = None) -> None:
        """Gives the layer its links. Local. `torus` places the group's ranks on nodes; by default all share one.

        Raises ConfigError when the group's size is not ep_size, and for replicas of experts that cannot have any.
        """
        self.dispatcher.connect(transport, torus)
        if self.dispatcher.replicas is not None:
            known_or_refused(self.experts, self.config.replicas, self.dispatcher.name)
            self.dispatcher.replicas.own_experts = self.experts.known

    def share_tokens(self, ranks: TensorRanks) -> None:
        """Shares the layer's tokens with the ranks of a tensor group, whose dense layers are cut over it. Local."""
        self.tensor_ranks = ranks

    @not_compiled
    def forward(
        self, x: Tensor, used_token: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [..., D], the weighted balance loss [], and this rank's choices per expert [E] for input [..., D].

        Collective over the expert group, forward and backward: every rank of the group calls it equally often, with
        any number of tokens (with a capacity: the same number). `used_token` [...] is zero for tokens to leave out;
        their output is zero. `residual`, of the input's shape, is added to the output, where the results are summed.
        """
        connection, device, tensor = self.dispatcher.checked_connection(), self._device, self.tensor_ranks
        with self.dispatcher.announcing(device, self.training, tensor.is_shared):
            self.experts.check()
            self._check_input(x, used_token, residual, device)
            x_TD = x if x.dim() == 2 else x.reshape(-1, self.hidden_size)
            tensor.compare(x_TD, self.dispatcher.name)
            used_T = None if used_token is None else tensor.all_tokens(used_token.reshape(-1) != 0)
            with tensor.drawing_alike(device, tensor.is_shared and self.gate.draws):
                routing = self.gate(tensor.all_tokens(x_TD), used_T)
        is_whole = isinstance(self.region, Whole)  # else each rank of the region would add the residual
        inside = routing if is_whole else replace(routing, weights_TK=self.region.copy_to_tp(routing.weights_TK))
        residual_TD = None if residual is None else residual.reshape(-1, self.hidden_size)
        y_TD = self._dispatch(self.region.copy_to_tp(x_TD), inside, residual_TD if is_whole else None)
        y_TD = self.region.reduce_from_tp(y_TD)
        if residual_TD is not None and not is_whole:
            y_TD = residual_TD + y_TD
        batch = None if self.config.balance_scope == "rank" else self._batch(x, connection.transport)
        loss = router_loss(routing, self.config, batch)
        self.last_counts_E = routing.count_E
        return y_TD if x.dim() == 2 else y_TD.view(x.shape), loss, self.last_counts_E

    def _batch(self, x: Tensor, transport: Transport) -> Batch:
        """The surroundings of an input's tokens that the balance loss reads."""
        around = Batch(
            sum_over_group=transport.sum, size=transport.size, load=self.gate.batch_load, training=self.training
        )
        if self.config.balance_scope != "sequence":
            return around
        second = x.shape[-2]
        token_T = torch.arange(x.numel() // self.hidden_size, device=x.device)
        parts = self.tensor_ranks.size if self.tensor_ranks.has_own_tokens else 1  # of each sequence, one per rank
        if self.config.sequence_first:
            return replace(around, sequence_T=(token_T % second).repeat(parts), num_sequences=second)
        num_sequences = len(token_T) // max(second, 1)
        return replace(around, sequence_T=(token_T // second).repeat(parts), num_sequences=num_sequences)

    def _dispatch(self, x_TD: Tensor, routing: Routing, residual_TD: Tensor | None) -> Tensor:
        tensor = self.tensor_ranks
        num_tokens = x_TD.shape[0]
        early = tensor.early_gather(num_tokens)
        share_TD, routes = tensor.cut(x_TD, routing, early)
        rows_TD, experts = local_experts(self.experts, share_TD)
        # Beside the rows of a share there are other tokens than a shared expert's.
        shared_form = None if self.shared is None or tensor.is_shared else self._shared_forms.common([self.shared])
        shared = None if self.shared is None or shared_form is None else shared_expert(shared_form, self.shared, x_TD)
        is_opaque = isinstance(experts, OpaqueExperts)  # whose results may get another type than the rows'
        added = None if is_opaque or tensor.is_shared else residual_TD
        y_TD, rest = self.dispatcher(rows_TD, routes, experts, self.training, shared, added, early)
        if isinstance(experts, OpaqueExperts):
            self.experts.output_type = experts.output_type
            y_TD = y_TD.to(experts.output_type or x_TD.dtype)
        gathered = tensor.begin_gather(y_TD, num_tokens, early)
        if self.shared is not None and shared is None:
            rest.append(tensor.beside(self.shared, x_TD))  # meanwhile
        y_TD = gathered()
        if residual_TD is not None and added is None:
            rest.append(residual_TD)
        for each in rest:
            y_TD = y_TD + each
        return y_TD

    def _check_input(self, x: Tensor, used_token: Tensor | None, residual: Tensor | None, device: torch.device) -> None:
        """Raises ConfigError for an input that the layer, which is on this device, cannot take."""
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ConfigError(
                f"input.shape={tuple(x.shape)}: the layer was made for hidden_size={self.hidden_size}; the last "
                "dimension must be that"
            )
        if self.config.balance_scope == "sequence" and (x.dim() < 3 or (self.config.sequence_first and x.dim() != 3)):
            raise ConfigError(
                f"input.shape={tuple(x.shape)}: with moe_ep.balance_scope='sequence' the layer must know which tokens "
                "are of one sequence; give it [batch, sequence, D], or [sequence, batch, D] with sequence_first"
            )
        if x.device != device:
            raise ConfigError(f"input.device={x.device}: the layer is on {device}; move the input there")
        parameter = first_parameter(self.experts)
        parameter = x if parameter is None else parameter
        if x.dtype != parameter.dtype and autocast_type(x, parameter) is None:
            raise ConfigError(
                f"input.dtype={x.dtype}: the experts' parameters are {parameter.dtype}; cast the input or the model, "
                "or call the layer inside of torch.autocast, which casts every floating type but float64"
            )
        if residual is not None and residual.shape != x.shape:
            raise ConfigError(
                f"residual.shape={tuple(residual.shape)}: it is added to an output of the input's shape "
                f"{tuple(x.shape)}; pass one of that shape"
            )
        if used_token is not None and used_token.numel() != x.numel() // self.hidden_size:
            raise ConfigError(
                f"used_token.shape={tuple(used_token.shape)}: holds {used_token.numel()} entries for "
                f"{x.numel() // self.hidden_size} tokens; give one per token"
            )
