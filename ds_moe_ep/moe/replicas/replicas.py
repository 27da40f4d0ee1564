"""Replica slots of one layer: the copies of a window, the rows that visit them, and the gradients that they owe.

A window is what lies between two changes of the weights. An engine says where it ends (`Window`); without one weights
may change before any pass, so that each forward pass gets them anew, and each backward pass sends its gradients.

1. Ranks tell each other their rows per expert (`told.py`), where without replicas each told a peer its share.
2. Where a window begins all compute one placement from the loads so far, and the weights travel (`copies.py`). They
   travel once more where the window's first pass has other rows than foretold and that pays, and once within a window,
   between two passes, where the loads have changed and all sums so far are at home.
3. All compute one assignment of rows to hosts, and this rank its send order (`rows.py`).
4. The backward pass sums the copies' gradients and, in a window's last, takes them home (`gradients.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.health.diagnosis import ranks_named
from ds_moe_ep.kernels.eager import is_inside_backward
from ds_moe_ep.kernels.sort import SortedChoices, sort_choices
from ds_moe_ep.moe.agreement import NUM_COLUMNS, AgreedCounts, Agreement
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.experts import KnownExperts, LocalExperts
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.replicas.copies import Copies
from ds_moe_ep.moe.replicas.costs import assumed_costs, measured_costs
from ds_moe_ep.moe.replicas.gradients import Collect, Ledger, Lend, LentPass, Loan, lent_pass
from ds_moe_ep.moe.replicas.rows import maps_to_hosts
from ds_moe_ep.moe.replicas.told import Digests, Told, num_told, present, told_columns
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.split_experts import Weights
from ds_moe_ep.schedule.assignment import assign
from ds_moe_ep.schedule.copies.forecast import UNEVEN, Forecast, moved_share
from ds_moe_ep.schedule.placement import MAX_AUTO_SLOTS, CopyCosts, Placement, levelled_rows, place
from ds_moe_ep.schedule.price import Costs
from ds_moe_ep.schedule.spans import Tags

Known = tuple[Form, Sequence[Weights]]
Choose = Callable[[Sequence[float], Placement], Placement]  # from rows per expert and the placement before

SAME = 0.01  # of the rows go to other experts than when a placement was found best: no other is looked for


class Window(Protocol):
    """The windows of an engine, the same on every rank."""

    @property
    def number(self) -> int:
        """Number of the window: optimizer steps and loads so far."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a window."""

    def is_last(self) -> bool:
        """True in the backward passes behind which the weights change."""


class Replicas:
    """The replica slots of one layer on one rank. All ranks of the group call it alike."""

    def __init__(self, slots: int | Literal["auto"], num_experts: int, link: Transport, torus: Torus) -> None:
        self.num_local = num_experts // link.size
        self.num_slots = min(MAX_AUTO_SLOTS if slots == "auto" else slots, num_experts - self.num_local)
        self.link, self.torus = link, torus
        self.window: Window | None = None
        self.choose: Choose = self._by_price
        self.choose_anew: Choose = self._by_price_anew
        self.costs: CopyCosts | None = None
        none = Placement.without_guests(link.size, self.num_local, 0 if slots == "auto" else self.num_slots)
        self.copies = Copies.none(none, self.num_slots)
        self.loads = Forecast(num_experts)
        self._settled: tuple[int, Sequence[float]] = 0, ()  # micro-batches and loads for which the placement stayed
        self._slots = slots
        self._known_window = -1  # in which the copies were made
        self._moved_in = -1  # the last window whose copies moved within it
        self._used_in = -1  # the last window with a pass of training
        self._is_due = False  # the loads have changed: sums go home, and copies move in the next pass
        self._renewals = 0
        self._open: weakref.WeakSet[LentPass] = weakref.WeakSet()  # forward passes that may go backward yet
        self._ledger = Ledger()
        self._digests = Digests()
        self._layer = ""  # the name in the last pass
        self._anchor: Tensor | None = None
        self._weights: KnownExperts | None = None  # that the last pass of training computed with, as they are now
        self._loan: tuple[Loan, Tensor] | None = None
        self.own_experts: Callable[[], Known | None] = lambda: None  # with the way to their gradients
        self.opens: Replicas | None = None  # the layer behind, whose loan this one's pass opens

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.copies.placement

    @property
    def window_number(self) -> int:
        """Changes of the weights so far, as all ranks count them."""
        return self._renewals if self.window is None else self.window.number

    @property
    def num_told(self) -> int:
        """Columns that this rank tells in the exchange of counts."""
        return num_told(self.placement.num_experts, self.num_local, self.num_slots)

    @property
    def _micro_batches(self) -> int:
        return 1 if self.window is None else self.window.micro_batches

    def _by_price(self, rows_E: Sequence[float], before: Placement) -> Placement:
        others_E = self.loads.others_E if rows_E == self.loads.rows_E else ()  # a forecast errs; a pass is what it is
        if not others_E and before == self.placement and self._is_settled(rows_E):
            return before
        found = place(rows_E, self.torus, self._slots, self._costs_now(), before, others_E)
        self._settled = self._micro_batches, rows_E if found == before and any(rows_E) else ()
        return found

    def _is_settled(self, rows_E: Sequence[float]) -> bool:
        """True for such loads as those for which a search kept the placement: another one would find no other."""
        micro_batches, settled_E = self._settled
        if not settled_E or micro_batches != self._micro_batches:
            return False
        return moved_share(rows_E, settled_E) + abs(sum(rows_E) / sum(settled_E) - 1) <= SAME

    def _by_price_anew(self, rows_E: Sequence[float], before: Placement) -> Placement:
        return place(rows_E, self.torus, self._slots, self._costs_now(), before, has_begun=True)

    def _costs_now(self) -> CopyCosts:
        assert self.costs is not None, "a pass has begun"
        return replace(self.costs, micro_batches=self._micro_batches)

    def take_costs(self, costs: Costs, num_rows: int, rows_ND: Tensor, experts: LocalExperts) -> None:
        """Takes what rows and exchanges cost as the schedule "auto" measured it, where slots are "auto" as well.

        A number of slots is used by loads and sizes alone: then runs place copies alike, whatever they measured.
        """
        known = experts.known()
        if known is None or not num_rows or self._slots != "auto":
            return
        row_type = rows_ND.shape[1], rows_ND.dtype  # not of the rows, of which this rank may have none
        self._settled = 0, ()
        self.costs = measured_costs(costs, num_rows, row_type, known[1], self._micro_batches, self.torus)

    def begin(
        self, routes: Routes, agreement: Agreement, experts: LocalExperts, training: bool, in_triton: bool | None
    ) -> HostedPass:
        """A forward pass, whose exchange of counts is on its way. Collective."""
        self._layer = agreement.call.layer
        self.copies.transfer.wait()  # those of a window that begins with this pass
        if self.opens is not None:
            self.opens.open_loan()
        known = known_or_refused(experts, self._slots, agreement.call.layer)
        if self.costs is None:
            self.costs = assumed_costs(agreement.row_type, known.weights, self._micro_batches, self.link.size)
        agreement = replace(
            agreement,
            placement=self.placement.key,
            window=self.window_number,
            holds_placement=(self.window is None or self._is_due)
            and any("backward" not in lent.state for lent in self._open),
        )
        is_used_TK = routes.is_used_TK if routes.capacity is None else routes.is_kept_TK
        in_order = sort_choices(routes.expert_ids_TK, is_used_TK, agreement.num_experts, in_triton)
        self._digests.begin((self._renewals, self.window_number, training))
        columns = told_columns(in_order.count_E, known.weights, self.copies.lent, self.copies.held, self._digests)
        counts = agreement.begin_telling(columns, -1 if routes.capacity is None else routes.capacity)
        is_counted = training and not is_inside_backward()
        if is_counted:
            self._weights = None if torch.is_autocast_enabled(columns.device.type) else detached(known)
        return HostedPass(self, known, agreement, in_order, is_used_TK, counts, is_counted)

    def prepare(self, told: Told, known: KnownExperts, is_counted: bool, is_held: bool, tags: Tags) -> None:
        """Renews placement and copies where a window begins, weights or loads have changed. Collective."""
        moves = self._is_due and is_counted and not is_held and not self._ledger.sums.owed
        is_first = is_counted and self.window is not None and self._used_in != self.window.number
        rows_E = [sum(rows) for rows in zip(*told.rows_RE, strict=True)]
        if is_counted:
            self._used_in = self.window_number
            self.loads.add(rows_E)
            self._see_change()
        has_changed = told.changed(self.placement)
        is_inside = is_inside_backward()
        begins = not is_inside and (moves or self.window is None or self._known_window != self.window.number)
        if begins or (has_changed and not is_inside):
            self._begin_window(known, tags, begins and not is_held, self._expected(rows_E))
            self.copies.transfer.wait()
            return
        if has_changed:
            raise EngineError(
                f"{tags.layer or 'MoE layer'}: weights of experts changed between the forward pass and its "
                "recomputation, whose copies have the ones before; change weights between steps alone"
            )
        told.check_copies(self.placement, tags.layer, self.link.ranks)
        if is_first and not is_inside:
            self._move_anew(known, tags, self._expected(rows_E))

    def _expected(self, rows_E: Sequence[int]) -> list[float]:
        """Rows of each expert per micro-batch of a window: of its first one these, of the others what is foretold."""
        others = self._micro_batches - 1
        told_E = self.loads.rows_E if others else rows_E
        return [(now + others * each) / (1 + others) for now, each in zip(rows_E, told_E, strict=True)]

    def _move_anew(self, known: KnownExperts, tags: Tags, rows_E: Sequence[float]) -> None:
        """Moves the copies of a window that has just begun, where its loads are far from level and it pays. Collective.

        Nobody owes gradients of the copies before: this is the window's first pass.
        """
        load_R = levelled_rows([round(rows) for rows in rows_E], self.placement)
        if max(load_R) * len(load_R) <= UNEVEN * sum(load_R):
            return
        placement = self.choose_anew(rows_E, self.placement)
        if placement != self.placement:
            self._compare(placement, present(known.weights[0])[0].device, tags)
            self._renew(placement, known, tags)
            self.copies.transfer.wait()

    def _see_change(self) -> None:
        """Sees to it that copies move within a window, at most once, where the loads have become others.

        The gradients of this pass's copies, and of those before, go home in its backward pass: then nobody owes any.
        """
        if self.window is not None and self.loads.has_changed and self._moved_in != self.window.number:
            self._is_due = self.choose(self.loads.rows_E, self.placement) != self.placement

    def begin_early(self) -> None:
        """Starts to send the copies of an engine's next window, whose first pass waits for them. Collective.

        Where the weights to come are not known here, that pass does all of it.
        """
        if self._weights is not None and self.window is not None and self.loads.has_passes:
            self._begin_window(self._weights, Tags(self._layer, "forward"), True, self.loads.rows_E)

    def _begin_window(self, known: KnownExperts, tags: Tags, may_place: bool, rows_E: Sequence[float]) -> None:
        placement = self.placement
        if self.window is not None and self._known_window == self.window.number and may_place:
            self._moved_in = self.window.number
        self._is_due = self._is_due and not may_place
        if may_place and self.loads.has_passes:
            self.refuse_unsent(tags.layer)
            placement = self.choose(rows_E, placement)
            self._compare(placement, present(known.weights[0])[0].device, tags)
        if self.window is not None and self.loads.has_passes:
            self._known_window = self.window.number
        self._renew(placement, known, tags)

    def _compare(self, placement: Placement, device: torch.device, tags: Tags) -> None:
        """Raises EngineError, on every rank, where ranks came to different placements. Collective; a device sync."""
        own_PC = torch.zeros(self.link.size, NUM_COLUMNS, dtype=torch.int64, device=device)
        own_PC[:, 0] = placement.key
        keys = self.link.exchange_counts(own_PC, tags)[:, 0].tolist()
        odd = [self.link.ranks[peer] for peer, key in enumerate(keys) if key != keys[0]]
        if odd:
            raise EngineError(
                f"{tags.layer or 'MoE layer'}: {ranks_named(odd)} came to another placement of copies than rank "
                f"{self.link.ranks[0]}: the ranks have seen other loads; give every rank the same configuration, and "
                "start all of them from one checkpoint"
            )

    def _renew(self, placement: Placement, known: KnownExperts, tags: Tags) -> None:
        """Starts to make the copies of a placement from the weights of now. Collective."""
        self.copies = Copies.none(placement, self.num_slots)  # the memory of those before is free first
        if not placement.copies:
            return
        self._renewals += 1
        tags = replace(tags, peers=f"copies {self._renewals}")
        self.copies = Copies.start(placement, known.weights, self.link, tags, self.num_slots)

    def lend(self, lent: LentPass, known: KnownExperts, rows_ND: Tensor) -> tuple[Tensor, KnownExperts]:
        """Rows and experts of a pass that goes backward, with the nodes of autograd that take gradients home."""
        self._open.add(lent)
        loan, token = self._loan or self._new_loan(known)
        guests = [guest for guest in self.copies.held if guest is not None]
        weights = [weight for guest in guests for weight in present(guest)]
        outputs = Lend.apply(loan, lent, token.grad_fn, token, rows_ND, *weights)  # type: ignore[no-untyped-call]
        rest = iter(outputs[1:])
        named = [{name: None if w is None else next(rest) for name, w in guest.items()} for guest in guests]
        return outputs[0], KnownExperts(known.form, [*known.weights, *named])

    def open_loan(self) -> None:
        """Makes the node that waits for gradients, for the passes until `close_loan`.

        Of the nodes that are ready autograd runs the one that was made last: this one waits behind all that is made
        after it, under whose backward passes the sums travel.
        """
        known = self.own_experts() if torch.is_grad_enabled() else None
        self._loan = None if known is None else self._new_loan(KnownExperts(*known))

    def close_loan(self) -> None:
        """Ends the use of the open loan: later passes make their own."""
        self._loan = self.opens = None

    def _new_loan(self, known: KnownExperts) -> tuple[Loan, Tensor]:
        device = present(known.weights[0])[0].device
        if self._anchor is None or self._anchor.device != device:
            with torch.inference_mode(False):
                self._anchor = torch.zeros(0, device=device, requires_grad=True)
        own = [present(named) for named in known.weights]
        loan = Loan(self._ledger, self.link, own, self._is_last, self.window_number, self._layer)
        return loan, Collect.apply(loan, self._anchor, *known.expert_parameters())  # type: ignore[no-untyped-call]

    def _is_last(self) -> bool:
        return self.window is None or self._is_due or self.window.is_last()

    def refuse_unsent(self, layer: str) -> None:
        """Raises EngineError where gradients of copies are still here, and their window is over. Local."""
        if owed := self._ledger.sums.owed:
            raise EngineError(
                f"{layer or 'MoE layer'}: gradients of {len(owed)} copies of experts did not go home before "
                "the optimizer's step: the layer took part in no backward pass at the accumulation boundary; let each "
                "micro-batch visit it, or set moe_ep.replicas to 0"
            )


class HostedPass:
    """One forward pass of a layer with replicas."""

    def __init__(
        self,
        replicas: Replicas,
        known: KnownExperts,
        agreement: Agreement,
        in_order: SortedChoices,
        is_used_TK: Tensor | None,
        counts: Callable[[], AgreedCounts],
        is_counted: bool,
    ) -> None:
        self._replicas, self._known, self._agreement, self._counts = replicas, known, agreement, counts
        self._in_order, self._is_used_TK, self._is_counted = in_order, is_used_TK, is_counted
        self._lent: LentPass | None = None

    def finish(self) -> DispatchPlan:
        """The plan, once the counts of all ranks are here; the copies are then those of the pass. Collective.

        Its errors close the lanes: the peers are about to send rows.
        """
        replicas, rank, tags = self._replicas, self._agreement.transport.rank, self._agreement.call.tags
        agreed = self._counts()
        try:
            told = Told.read(agreed.recv_PL, self._agreement.num_experts, replicas.num_local)
            replicas.prepare(told, self._known, self._is_counted, agreed.is_placement_held, tags)
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


def detached(known: KnownExperts) -> KnownExperts:
    """The same memory without a graph."""
    weights = [{name: None if w is None else w.detach() for name, w in named.items()} for named in known.weights]
    return KnownExperts(known.form, weights)


def known_or_refused(experts: LocalExperts, slots: int | Literal["auto"], layer: str) -> KnownExperts:
    """The experts by their weights. Raises ConfigError where their mathematics is unknown."""
    known = experts.known()
    if known is None:
        raise ConfigError(
            f"moe_ep.replicas={slots!r}: the experts of {layer or 'the layer'} are none whose weights are all that "
            "they compute with (Linear-GELU-Linear, or SwiGLU, of plain Linears), so that no other rank can compute "
            "for them; set it to 0"
        )
    return KnownExperts(*known)
