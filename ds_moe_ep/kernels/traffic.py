"""Bytes that each operation moves at least and the kernels that it launches, by its sizes. Needs no torch.

The bound is what the Triton kernel does: every wide tensor passes memory once. Index maps and numbers per token, less
than a thousandth of a wide tensor, are left out. Plain torch moves more, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

# Numbers of the hidden rows of one expert and piece from which its product fills a device six times over: 132
# multiprocessors with tiles of 128 x 256. Its last, partly filled round costs less then than rows by expert do.
LARGE_PRODUCT = 6 * 132 * 128 * 256


@dataclass(frozen=True, kw_only=True)
class OperationSizes:
    """Sizes that operations depend on: T tokens of width D with K choices each, E experts of width F."""

    num_tokens: int
    width: int
    num_choices: int = 1
    num_experts: int = 16
    expert_width: int = 0
    item_bytes: int = 2  # of a token's number
    num_added: int = 0  # tensors [T, D] that unpermute adds

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens: the unit of most operations."""
        return self.num_tokens * self.width * self.item_bytes

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden rows of as many rows as there are choices."""
        return self.num_tokens * self.num_choices * self.expert_width * self.item_bytes


@dataclass(frozen=True)
class LeastTraffic:
    """Bytes read and written by one call, and its launches."""

    num_bytes: int
    num_launches: int


def _tokens(times: Callable[[OperationSizes], int], num_launches: int = 1) -> Callable[[OperationSizes], LeastTraffic]:
    return lambda sizes: LeastTraffic(times(sizes) * sizes.token_bytes, num_launches)


def _hidden(times: int) -> Callable[[OperationSizes], LeastTraffic]:
    return lambda sizes: LeastTraffic(times * sizes.hidden_bytes, 1)


def _gate(times: int, num_launches: int) -> Callable[[OperationSizes], LeastTraffic]:
    """The tokens some times, and the weight in fp32 as often."""
    return lambda s: LeastTraffic(times * (s.token_bytes + 4 * s.num_experts * s.width), num_launches)


def _sort(sizes: OperationSizes) -> LeastTraffic:
    """Choices are read twice, both maps written once, all as int64."""
    return LeastTraffic(4 * 8 * sizes.num_tokens * sizes.num_choices, 3)


Rule = Callable[[OperationSizes], LeastTraffic]

TRAFFIC: dict[str, Rule] = {
    "permute forward": _tokens(lambda s: 1 + s.num_choices),
    "permute backward": _tokens(lambda s: s.num_choices + 1),
    "weighted permute forward": _tokens(lambda s: 1 + s.num_choices),
    "weighted permute backward": _tokens(lambda s: s.num_choices + 2),  # the tokens too, for the weights
    "unpermute forward": _tokens(lambda s: s.num_choices + 1 + s.num_added),
    "unpermute backward": _tokens(lambda s: 1 + 2 * s.num_choices),
    "gate forward": _gate(1, 2),  # counts are cleared first
    "gate backward": _gate(2, 4),  # logits, tokens, parts of the weight, their sum
    "sort": _sort,  # counts are cleared first
    "gelu": _hidden(2),  # torch's own
    "swiglu": _hidden(3),
    "gelu backward": _hidden(4),  # with the active rows made again
    "gelu backward, active rows kept": _hidden(3),
    "swiglu backward": _hidden(6),
    "swiglu backward, active rows kept": _hidden(5),
    "rotation forward": _tokens(lambda s: 4),  # queries and keys in, and out
    "rotation backward": _tokens(lambda s: 6),  # values too
}


def _wide(s: OperationSizes) -> int:
    """Passes over a tensor in fp32, over one of the tokens' type."""
    return 4 // s.item_bytes


def _plain_unpermute(s: OperationSizes) -> int:
    """A gather, a product with weights in fp32 and a sum for each choice, then a cast."""
    w, further = _wide(s), s.num_choices - 1
    if s.num_choices == 1 and not s.num_added:
        return 4
    return (2 + 1 + w) + further * (2 + 2 * w + 1) + s.num_added * (2 * w + 1) + (w + 1) * (w > 1)


def _plain_weighted_permute(s: OperationSizes) -> int:
    """A gather, a product with weights in fp32, a cast."""
    w = _wide(s)
    return s.num_choices * (2 + 1 + w + (w + 1) * (w > 1))


def _plain_weighted_permute_backward(s: OperationSizes) -> int:
    """The weighted sum of a token's rows, and the dot of each with its token for the weights."""
    return s.num_choices * (4 + 4 * _wide(s)) + _plain_unpermute(replace(s, num_added=0))


def _plain_permute_backward(s: OperationSizes) -> int:
    """A gather for each choice, summed in fp32 where there is more than one."""
    w, further = _wide(s), s.num_choices - 1
    return 2 + bool(further) * 2 * (w + 1) * (w > 1) + further * (2 + 2 * w + 1)


PLAIN_TRAFFIC: dict[str, Rule] = {  # of plain torch on a device; gates widen the tokens, and activations go by steps
    **TRAFFIC,
    "permute forward": _tokens(lambda s: 2 * s.num_choices),
    "permute backward": _tokens(_plain_permute_backward, 5),
    "weighted permute forward": _tokens(_plain_weighted_permute, 4),
    "weighted permute backward": _tokens(_plain_weighted_permute_backward, 10),
    "unpermute forward": _tokens(_plain_unpermute, 6),
    "unpermute backward": _tokens(lambda s: s.num_choices * (6 + 4 * _wide(s)), 7),
    "gate forward": _gate(5, 40),  # by blocks: cast, product
    "gate backward": _gate(11, 80),
    "swiglu": _hidden(5),
    "gelu backward": _hidden(7),
    "swiglu backward": _hidden(16),
    "swiglu backward, active rows kept": _hidden(11),
    "rotation forward": _tokens(lambda s: 2 * (3 + 6 * _wide(s)), 20),
    "rotation backward": _tokens(lambda s: 2 * (3 + 6 * _wide(s)) + 2, 22),
}


def traffic(operation: str, sizes: OperationSizes) -> LeastTraffic:
    """The least traffic of one call of an operation of TRAFFIC."""
    return TRAFFIC[operation](sizes)


def plain_traffic(operation: str, sizes: OperationSizes) -> LeastTraffic:
    """The traffic of one call as plain torch makes it on a device, step by step."""
    return PLAIN_TRAFFIC[operation](sizes)
