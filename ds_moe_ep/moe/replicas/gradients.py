"""Gradients of copies: summed where they are computed, sent home in the last backward pass of a window.

Two nodes of autograd's graph do it. `Lend` stands behind the copies' weights and the rows: its backward pass takes the
copies' gradients, and in the last pass starts to send their sums. `Collect` stands between it and the home's
parameters: its backward pass waits for what comes, and returns the sums. A parameter then has two gradients, its own
experts' product and these sums, which autograd adds before anything that hangs on the parameter hears of one: once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.comm.transport import Message, Transfer, Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.weight_sums import FP32, sum_of
from ds_moe_ep.moe.replicas.copies import message
from ds_moe_ep.schedule.placement import Placement
from ds_moe_ep.schedule.spans import Tags


@dataclass(frozen=True, eq=False)
class LentPass:
    """One forward pass through copies, as its backward pass needs it: the same on every rank, but for `experts`.

    It lives as long as the graph of the pass.
    """

    placement: Placement
    trained_E: Sequence[int]  # a bit for each weight of an expert
    visited: frozenset[tuple[int, int]]  # (expert, host) of copies that got rows
    experts: Sequence[int]  # this rank's guests, in the order of the gradients
    state: set[str] = field(default_factory=set)  # "backward" where it has gone backward

    def is_trained(self, expert: int, index: int) -> bool:
        """True where one of the expert's weights needs a gradient."""
        return bool(self.trained_E[expert] >> index & 1)


@dataclass
class GradientSums:
    """Gradient sums of this rank's guests since they were last sent, and who owes whom."""

    passes: int = 0
    of: dict[int, list[Tensor | None]] = field(default_factory=dict)  # by expert, a sum for each weight
    owed: dict[tuple[int, int], int] = field(default_factory=dict)  # by (expert, host): a bit for each weight
    placement: Placement | None = None

    def add(self, lent: LentPass, grads: Mapping[int, Sequence[Tensor | None]]) -> None:
        """Adds the gradients of one backward pass, in fp32 where several add up."""
        self.passes += 1
        self.placement = lent.placement
        for expert, host in lent.visited:
            if lent.trained_E[expert]:
                self.owed[expert, host] = self.owed.get((expert, host), 0) | lent.trained_E[expert]
        for expert, parts in grads.items():
            before = self.of.get(expert, [None] * len(parts))
            self.of[expert] = [sum_of(old, new) for old, new in zip(before, parts, strict=True)]


class Returning:
    """GradientSums on their way home, and how they are added up there: for each expert by the rank of the host."""

    def __init__(
        self,
        sums: GradientSums,
        link: Transport,
        like: Sequence[Sequence[Tensor]],
        device: torch.device,
        window: int,
        tags: Tags,
    ) -> None:
        """Starts the transfer. Collective. `like` has shapes and types of this rank's own weights, whose sums come."""
        assert sums.placement is not None
        home, sends, receives = sums.placement.home, list[Message](), list[Message]()
        self._first = link.rank * sums.placement.local_experts
        self._received: list[tuple[int, int, Tensor, Tensor, dict[int, Tensor]]] = []
        self._layer, self._ranks = tags.layer, link.ranks
        for (expert, host), bits in sorted(sums.owed.items()):
            labels = to_device([expert, window, sums.passes, bits], device).view(1, -1)
            if host == link.rank:
                parts = sums.of[expert]
                sends.append(message(home(expert), labels))
                for index, part in enumerate(parts):
                    if bits >> index & 1:
                        assert part is not None, "a trained weight has a gradient, be it zero"
                        sends.append(
                            message(home(expert), part.to(_sent_type(like[0][index], sums.passes)).contiguous())
                        )
            elif home(expert) == link.rank:
                weights = like[expert - self._first]
                came, room = torch.empty_like(labels), dict[int, Tensor]()
                receives.append(message(host, came))
                for index, weight in enumerate(weights):
                    if bits >> index & 1:
                        room[index] = torch.empty_like(weight, dtype=_sent_type(weight, sums.passes), device=device)
                        receives.append(message(host, room[index]))
                self._received.append((expert, host, labels, came, room))
        self._kept = sends  # until the transfer is over
        self._transfer: Transfer = link.start("replicas", sends, receives, tags)

    def add_to(self, totals: list[list[Tensor | None]]) -> None:
        """Waits for the sums, and adds them up per own expert and weight. Raises EngineError for sums of others."""
        self._transfer.wait()
        self._kept = []
        for expert, host, labels, came, room in self._received:
            check_labels(labels, came, self._layer, self._ranks[host])
            for index, grad in room.items():
                own = totals[expert - self._first]
                own[index] = sum_of(own[index], grad)
        self._received = []


def check_labels(expected: Tensor, came: Tensor, layer: str, host: int) -> None:
    """Raises EngineError where sums that came are not those of this expert and window, with every pass in them once."""
    if came.is_cuda or torch.equal(expected, came):  # there it would be a device sync; lengths and order still hold
        return
    (expert, window, passes, _), (its, theirs, added, _) = expected[0].tolist(), came[0].tolist()
    raise EngineError(
        f"{layer or 'MoE layer'}: the gradient of expert {expert} in window {window}, of {passes} backward passes, was "
        f"expected from its copy on rank {host}; what came is that of expert {its} in window {theirs}, of {added} "
        "passes: ranks are out of step; start again from the last checkpoint, or set moe_ep.replicas to 0"
    )


def _sent_type(like: Tensor, passes: int) -> torch.dtype:
    """The type in which sums travel: that of one pass is a gradient as any, those of several keep fp32."""
    return like.dtype if passes == 1 else torch.promote_types(like.dtype, FP32)


class Ledger:
    """The sums of one layer's window so far, over all of its loans."""

    def __init__(self) -> None:
        self.sums = GradientSums()

    def take(self) -> GradientSums:
        """The sums, which begin anew."""
        sums, self.sums = self.sums, GradientSums()
        return sums


class Loan:
    """The shared state of the two nodes: where gradients of copies go, and those that came for this rank's weights."""

    def __init__(
        self,
        ledger: Ledger,
        link: Transport,
        own: Sequence[Sequence[Tensor]],
        is_last: Callable[[], bool],
        window: int,
        layer: str,
    ) -> None:
        self._ledger, self._link, self._device = ledger, link, own[0][0].device
        self._like = [[shape_of(weight) for weight in parts] for parts in own]
        self._is_last, self._window, self._layer = is_last, window, layer
        self._returning: list[Returning] = []

    def take(self, lent: LentPass, grads: Mapping[int, Sequence[Tensor | None]]) -> None:
        """Takes a backward pass's gradients of copies; starts to send their sums where it is a window's last."""
        self._ledger.sums.add(lent, grads)
        if self._is_last():
            tags = Tags(self._layer, "backward", f"sums of window {self._window}")
            sums = self._ledger.take()
            self._returning.append(Returning(sums, self._link, self._like, self._device, self._window, tags))

    def collect(self) -> list[Tensor | None]:
        """The sums that came for the own weights, in the order of the parameters; waits for them."""
        totals: list[list[Tensor | None]] = [[None] * len(parts) for parts in self._like]
        returning, self._returning = self._returning, []
        for each in returning:
            each.add_to(totals)
        both = zip((w for parts in self._like for w in parts), (t for parts in totals for t in parts), strict=True)
        return [None if total is None else total.to(weight.dtype) for weight, total in both]


def shape_of(weight: Tensor) -> Tensor:
    """A tensor of the same shape and type without memory or graph."""
    return weight.detach().to("meta")


class Collect(torch.autograd.Function):
    """From the home's parameters to a token, which `Lend` takes."""

    @staticmethod
    def forward(ctx: Any, loan: Loan, anchor: Tensor, *own: Tensor) -> Tensor:
        ctx.loan = loan
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.loan.collect()


class Lend(torch.autograd.Function):
    """From the token, the rows and the copies' weights to the same rows and weights, as an expert pass takes them."""

    @staticmethod
    def forward(
        ctx: Any, loan: Loan, lent: LentPass, collect: Any, token: Tensor, rows_ND: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.loan, ctx.lent, ctx.collect = loan, lent, collect
        ctx.num_weights = len(weights) // max(len(lent.experts), 1)
        outputs = [weight.detach() for weight in weights]
        frozen = [
            outputs[place * ctx.num_weights + index]
            for place, expert in enumerate(lent.experts)
            for index in range(ctx.num_weights)
            if not lent.is_trained(expert, index)
        ]
        ctx.mark_non_differentiable(*frozen)
        return rows_ND.detach(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_ND: Tensor, *d_weights: Tensor) -> tuple[Tensor | None, ...]:
        lent, num = ctx.lent, ctx.num_weights
        lent.state.add("backward")
        # A backward pass that is not asked for gradients of parameters has none of copies either.
        if torch._C._will_engine_execute_node(ctx.collect):
            grads = {
                expert: [d_weights[i * num + j] if lent.is_trained(expert, j) else None for j in range(num)]
                for i, expert in enumerate(lent.experts)
            }
            ctx.loan.take(lent, grads)
        return None, None, None, d_rows_ND.new_empty(0), d_rows_ND, *[None] * len(d_weights)
