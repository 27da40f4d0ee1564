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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import is_on_host
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.eager import is_inside_backward
from ds_moe_ep.kernels.sort import SortedChoices, sort_choices
from ds_moe_ep.moe.agreement import NUM_TOLD, AgreedCounts, Agreement
from ds_moe_ep.moe.experts import KnownExperts, LocalExperts
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.replicas.compare import check_keys
from ds_moe_ep.moe.replicas.copies import Copies
from ds_moe_ep.moe.replicas.costs import costs_by_sizes, measured_costs
from ds_moe_ep.moe.replicas.found_experts import detached, known_or_refused
from ds_moe_ep.moe.replicas.gradients import Collect, Ledger, Lend, LentPass, Loan
from ds_moe_ep.moe.replicas.told import Digests, Told, device_of, num_told, present, told_columns
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.split_experts import Weights
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

    @property
    def is_in_order(self) -> bool:
        """True where each micro-batch goes backward before the next one goes forward: copies may move between them."""

    def is_last(self, passes: int) -> bool:
        """True in the backward passes behind which the weights change; `passes` have gone backward since a step."""


class BegunPass(NamedTuple):
    """One forward pass whose counts are on their way."""

    known: KnownExperts
    agreement: Agreement
    in_order: SortedChoices
    is_used_TK: Tensor | None
    counts: Callable[[], AgreedCounts]
    is_counted: bool  # its loads are those of training


class Replicas:
    """The replica slots of one layer on one rank. All ranks of the group call it alike."""

    def __init__(self, config: MoEConfig, link: Transport, torus: Torus) -> None:
        self._config, slots, num_experts = config, config.replicas, config.num_experts
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
        self.weights: KnownExperts | None = None  # that the last pass of training computed with, as they are now
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
    ) -> BegunPass:
        """A forward pass, whose exchange of counts is on its way. Collective."""
        self._layer = agreement.call.layer
        self.copies.transfer.wait()  # those of a window that begins with this pass
        if self.opens is not None:
            self.opens.open_loan()
        known = known_or_refused(experts, self._slots, agreement.call.layer)
        if self.costs is None:
            sizes = agreement.row_type, known.weights, self._micro_batches, self.link.size
            self.costs = costs_by_sizes(self._config, *sizes)
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
        counts = self._begin_counts(
            agreement, in_order.count_E, known, -1 if routes.capacity is None else routes.capacity
        )
        is_counted = training and not is_inside_backward()
        if is_counted:
            self.weights = None if torch.is_autocast_enabled(in_order.count_E.device.type) else detached(known)
        return BegunPass(known, agreement, in_order, is_used_TK, counts, is_counted)

    def _begin_counts(
        self, agreement: Agreement, count_E: Tensor, known: KnownExperts, capacity: int
    ) -> Callable[[], AgreedCounts]:
        """Starts the exchange of counts: where copies are in use all ranks tell all others what they have.

        On the host a pass without copies is one without slots, but for the totals that the first rank adds.
        """
        if is_on_host(count_E.device) and not self.placement.copies and self.num_local <= NUM_TOLD:
            return agreement.begin_counts(count_E.view(self.link.size, -1), capacity)
        return agreement.begin_telling(self.told(count_E, known), len(count_E), capacity)

    def told(self, count_E: Tensor, known: KnownExperts) -> Tensor:
        """The columns that this rank tells all others of a pass."""
        return told_columns(count_E, known.weights, self.copies.lent, self.copies.held, self._digests)

    def prepare(
        self, rows_E: Sequence[int], told: Told | None, known: KnownExperts, is_counted: bool, is_held: bool, tags: Tags
    ) -> None:
        """Renews placement and copies where a window begins, weights or loads have changed. Collective.

        `told`: None where no copies are in use.
        """
        moves = self._is_due and is_counted and not is_held and not self._ledger.sums.owed
        is_first = is_counted and self.window is not None and self._used_in != self.window.number
        if is_counted:
            self._used_in = self.window_number
            self.loads.add(rows_E)
            self._see_change()
        has_changed = told is not None and told.changed(self.placement)
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
        if told is not None:
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
            self._compare(placement, known, tags)
            self._renew(placement, known, tags)
            self.copies.transfer.wait()

    def _see_change(self) -> None:
        """Sees to it that copies move within a window, at most once, where the loads have become others.

        The gradients of this pass's copies, and of those before, go home in its backward pass: then nobody owes any.
        """
        window = self.window
        if window is not None and window.is_in_order and self.loads.has_changed and self._moved_in != window.number:
            self._is_due = self.choose(self.loads.rows_E, self.placement) != self.placement

    def begin_early(self) -> None:
        """`begin_windows` of this layer alone."""
        begin_windows([self])

    @property
    def knows_next(self) -> bool:
        """True where an engine's next window can begin without a pass: loads are known, and the weights to come."""
        return self.weights is not None and self.window is not None and self.loads.has_passes

    def choose_next(self) -> Placement:
        """The placement of an engine's next window. Local, the same on every rank."""
        self.refuse_unsent(self._layer)
        return self.choose(self.loads.rows_E, self.placement)

    def begin_next(self, placement: Placement) -> None:
        """Starts to send the copies of an engine's next window. Collective."""
        assert self.weights is not None and self.window is not None
        self._is_due, self._known_window = False, self.window.number
        self._renew(placement, self.weights, self.tags)

    @property
    def tags(self) -> Tags:
        """Where the layer is between its passes."""
        return Tags(self._layer, "forward")

    def _begin_window(self, known: KnownExperts, tags: Tags, may_place: bool, rows_E: Sequence[float]) -> None:
        placement = self.placement
        if self.window is not None and self._known_window == self.window.number and may_place:
            self._moved_in = self.window.number
        self._is_due = self._is_due and not may_place
        if may_place and self.loads.has_passes:
            self.refuse_unsent(tags.layer)
            placement = self.choose(rows_E, placement)
            self._compare(placement, known, tags)
        if self.window is not None and self.loads.has_passes:
            self._known_window = self.window.number
        self._renew(placement, known, tags)

    def moves_to(self, placement: Placement) -> bool:
        """True where copies are in use before or after: then ranks compare, since weights are about to move."""
        return bool(placement.copies or self.placement.copies)

    def _compare(self, placement: Placement, known: KnownExperts, tags: Tags) -> None:
        if self.moves_to(placement):
            check_keys(self.link, [(tags, placement.key)], device_of(known.weights[0]))

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
        return self.window is None or self._is_due or self.window.is_last(self._ledger.num_passes)

    def forget_passes(self) -> None:
        """Counts backward passes anew: the optimizer steps, or leaves a step out."""
        self._ledger.num_passes = 0

    def refuse_unsent(self, layer: str) -> None:
        """Raises EngineError where gradients of copies are still here, and their window is over. Local."""
        if owed := self._ledger.sums.owed:
            raise EngineError(
                f"{layer or 'MoE layer'}: gradients of {len(owed)} copies of experts did not go home before "
                "the optimizer's step: the layer took part in no backward pass at the accumulation boundary; let each "
                "micro-batch visit it, or set moe_ep.replicas to 0"
            )


def begin_windows(layers: Sequence[Replicas]) -> None:
    """Starts to send the copies of an engine's next window, whose first passes wait for them. Collective.

    Placements of all layers of a group are compared at once; none that was and stays without copies: ranks that differ
    there meet in the next pass. Where the weights to come are not known here, a layer's first pass does all of it.
    """
    chosen = [(each, each.choose_next()) for each in layers if each.knows_next]
    by_group: dict[tuple[int, ...], list[tuple[Replicas, Placement]]] = {}
    for each, placement in chosen:
        if each.moves_to(placement):
            by_group.setdefault(tuple(each.link.ranks), []).append((each, placement))
    for same in by_group.values():
        first, _ = same[0]
        assert first.weights is not None
        check_keys(
            first.link, [(each.tags, placement.key) for each, placement in same], device_of(first.weights.weights[0])
        )
    for each, placement in chosen:
        each.begin_next(placement)
