"""One forward pass of a layer with slots: its plan, the experts that it computes, and the way of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_moe_ep.moe.agreement import AgreedCounts
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.experts import KnownExperts, LocalExperts
from ds_moe_ep.moe.replicas.gradients import LentPass, lent_pass
from ds_moe_ep.moe.replicas.replicas import BegunPass, Replicas
from ds_moe_ep.moe.replicas.rows import maps_of, maps_to_hosts
from ds_moe_ep.moe.replicas.told import Told, present
from ds_moe_ep.schedule.assignment import assign


class HostedPass:
    """One forward pass of a layer with replicas."""

    def __init__(self, replicas: Replicas, begun: BegunPass) -> None:
        self._replicas, self._known, self._agreement = replicas, begun.known, begun.agreement
        self._in_order, self._is_used_TK, self._is_counted = begun.in_order, begun.is_used_TK, begun.is_counted
        self._counts = begun.counts
        self._lent: LentPass | None = None

    def finish(self) -> DispatchPlan:
        """The plan, once the counts of all ranks are here; the copies are then those of the pass. Collective.

        Its errors close the lanes: the peers are about to send rows.
        """
        replicas, rank, tags = self._replicas, self._agreement.transport.rank, self._agreement.call.tags
        agreed = self._counts()
        try:
            told = None if agreed.total_E else self._read(agreed.recv_PL)
            rows_E = agreed.total_E if told is None else [sum(rows) for rows in zip(*told.rows_RE, strict=True)]
            replicas.prepare(rows_E, told, self._known, self._is_counted, agreed.is_placement_held, tags)
            if told is None and not replicas.placement.copies:
                return self._plan_without_copies(agreed)
            if told is None:  # the copies were made in this pass
                told = self._read(self._agreement.tell(replicas.told(self._in_order.count_E, self._known)))
            assignment = assign(told.rows_RE, replicas.placement, replicas.torus)
            self._lent = lent_pass(assignment, told.trained_E, rank)
            maps = maps_to_hosts(self._in_order, self._is_used_TK, assignment, rank)
        except BaseException as error:
            self._agreement.transport.abandon(error, tags)
            raise
        occupied = [*range(replicas.num_local)]
        occupied += [replicas.num_local + i for i, e in enumerate(replicas.placement.guests_RS[rank]) if e is not None]
        received_PL = tuple(tuple(row[place] for place in occupied) for row in assignment.received_PL(rank))
        return DispatchPlan(maps, assignment.sent_PL(rank), received_PL, agreed.is_drift_seen, agreed.goes_backward)

    def _read(self, told: Sequence[Sequence[int]]) -> Told:
        return Told.read(told, self._agreement.num_experts, self._replicas.num_local)

    def _plan_without_copies(self, agreed: AgreedCounts) -> DispatchPlan:
        self._lent = LentPass(self._replicas.placement, (), frozenset(), ())
        send_PL, recv_PL = (tuple(map(tuple, counts)) for counts in (agreed.send_PL, agreed.recv_PL))
        maps = maps_of(self._in_order, self._is_used_TK, sum(map(sum, send_PL)))
        return DispatchPlan(maps, send_PL, recv_PL, agreed.is_drift_seen, agreed.goes_backward)

    def experts(self) -> KnownExperts:
        """The experts that this rank computes, its guests last, with no way home for the guests' gradients."""
        assert self._lent is not None, "the plan is made before"
        guests = [guest for guest in self._replicas.copies.held if guest is not None]
        named = []
        for expert, guest in zip(self._lent.experts, guests, strict=True):
            parts = iter(range(len(present(guest))))
            named.append({name: None if w is None else self._leaf(expert, next(parts), w) for name, w in guest.items()})
        return KnownExperts(self._known.form, [*self._known.weights, *named])

    def _leaf(self, expert: int, index: int, weight: Tensor) -> Tensor:
        assert self._lent is not None
        return weight.detach().requires_grad_(self._lent.is_trained(expert, index) and torch.is_grad_enabled())

    def lend(self, rows_ND: Tensor) -> tuple[Tensor, LocalExperts]:
        """Rows and experts of a pass that goes backward: gradients of guests go home.

        Also where the group has no copies: another group may have some, and ZeRO reduces gradients of both together, in
        the order in which they come, which the nodes of the graph say.
        """
        assert self._lent is not None, "the plan is made before"
        return self._replicas.lend(self._lent, self._known, rows_ND)
