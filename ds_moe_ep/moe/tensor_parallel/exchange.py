"""Rows of tokens between whole tensors and the shares of a tensor group's ranks, and the gradients of both ways.

Each rank's share is a span of tokens, in the order of ranks; the first ones have a token more where the number does not
divide. The loss, and so the gradient of a whole tensor, is the same on every rank of the group: what comes back over
`gather` is a rank's own span of it, and what comes back over `cut` is gathered. Neither sums: nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch gave it another name and warns of the old one.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Spans:
    """How the tokens of a group of ranks lie."""

    group: dist.ProcessGroup
    rank: int
    size: int
    num_tokens: int

    def span(self, rank: int) -> tuple[int, int]:
        """First token and number of tokens of a rank."""
        each, rest = divmod(self.num_tokens, self.size)
        return rank * each + min(rank, rest), each + (rank < rest)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's span of a tensor [T, ...]; a view."""
        return whole.narrow(0, *self.span(self.rank))

    def gather(self, share: Tensor) -> Tensor:
        """The tensor [T, ...] of all ranks' spans. Collective over the group; no gradient."""
        return self.begin(share)()

    def begin(self, share: Tensor) -> Callable[[], Tensor]:
        """Begins to gather the tensor [T, ...] of all ranks' spans; the call of the result waits for it, once."""
        if not self.num_tokens:
            return lambda: share
        return begin_rows(self.group, [self.span(rank)[1] for rank in range(self.size)], share)


def begin_rows(group: dist.ProcessGroup, counts: Sequence[int], own: Tensor) -> Callable[[], Tensor]:
    """Begins to gather each rank's own rows, so many as `counts` says; the call of the result waits for them, once.

    Collective over the group; no gradient.
    """
    longest = max(counts)
    padded = own.contiguous()
    if len(own) < longest:  # all ranks send alike many rows
        padded = torch.cat([padded, padded.new_zeros(longest - len(own), *own.shape[1:])])
    buffer = padded.new_empty(len(counts) * padded.numel())  # flat: gloo takes no other
    sent = padded.flatten()
    work = all_gather(buffer, sent, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        rows = buffer.view(len(counts) * longest, *own.shape[1:])
        if sum(counts) == len(rows):
            return rows
        return torch.cat([rows.narrow(0, rank * longest, count) for rank, count in enumerate(counts)])

    return finish


class Gathered(Protocol):
    """Whoever may have gathered the gradient of the first of the tensors that are cut."""

    takes_gradient: bool

    def whole_gradient(self) -> Tensor | None:
        """The gradient [T, ...] of all ranks' spans; None where it was not gathered yet."""


def cut(spans: Spans, *whole: Tensor, early: Gathered | None = None) -> tuple[Tensor, ...]:
    """Whole tensors, alike on all ranks, to a rank's own spans; views. Local; collective on the way back.

    `early` may have gathered the first one's gradient by then; the cut says whether there will be any.
    """
    trained = [each for each in whole if each.requires_grad and torch.is_grad_enabled()]
    if not trained:
        return tuple(spans.own(each) for each in whole)
    if early is not None:
        early.takes_gradient = trained[0] is whole[0]
    spans_of_trained = iter(_Cut.apply(spans, early, *trained))  # type: ignore[no-untyped-call]
    return tuple(next(spans_of_trained) if each.requires_grad else spans.own(each) for each in whole)


def gather(spans: Spans, share: Tensor) -> Tensor:
    """Ranks' own spans to the whole tensor. Collective; local on the way back."""
    return begin_gather(spans, share)()


def begin_gather(spans: Spans, share: Tensor, begun: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
    """The same, begun, here or by whoever waits in `begun`; the call of the result waits for it, once."""
    finish = begun or spans.begin(share.detach())
    return lambda: _Gather.apply(spans, share, finish)  # type: ignore[no-untyped-call]


class _Cut(torch.autograd.Function):
    """One node for several tensors: their gradients are gathered in one order on all ranks."""

    @staticmethod
    def forward(context: Any, spans: Spans, early: Gathered | None, *whole: Tensor) -> tuple[Tensor, ...]:
        context.spans, context.early = spans, early
        return tuple(spans.own(each) for each in whole)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gathered = None if context.early is None else context.early.whole_gradient()
        there = [] if gathered is None else [gathered.to(gradients[0].dtype)]
        begun = [context.spans.begin(gradient) for gradient in gradients[len(there) :]]
        return None, None, *there, *(finish() for finish in begun)


class _Gather(torch.autograd.Function):
    """The gradient of the whole tensor is alike on all ranks, and each takes its own span of it."""

    @staticmethod
    def forward(context: Any, spans: Spans, share: Tensor, finish: Callable[[], Tensor]) -> Tensor:
        context.spans = spans
        return finish()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, context.spans.own(gradient), None
