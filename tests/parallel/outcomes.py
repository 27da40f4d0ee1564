"""Outcome of a training run on a rank, and how far that is from what one device saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.parallel.tensor import Share

WHOLE = Share(0, 1)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome on one rank; the reference is one too, of a rank that holds everything."""

    losses: list[float]
    cross_entropies: list[float]
    norms: list[float]  # of the gradient, before it is clipped
    weights: dict[str, Tensor]  # the last ones, by their names on one device
    gradients: dict[str, Tensor]  # those of one step of SGD, as clipped; empty after Adam
    share: Share = WHOLE


def furthest(found: Sequence[Outcome], expected: Outcome, what: str) -> tuple[float, str]:
    """The largest difference of any rank's `gradients` or `weights` from the reference's, and where it is.

    Relative to the largest value of the whole tensor. Every tensor must be on some rank.
    """
    whole = getattr(expected, what)
    everywhere = {name for outcome in found for name in getattr(outcome, what)}
    assert everywhere == whole.keys(), sorted(everywhere ^ whole.keys())
    return max(
        (float(difference.abs().max().nan_to_num(torch.inf) / scale_of(whole[name])), f"{name}, rank {rank}")
        for rank, outcome in enumerate(found)
        for name, part in getattr(outcome, what).items()
        for difference in [part - outcome.share.of(whole[name], name)]
    )


def scale_of(whole: Tensor) -> float:
    """The largest value of a tensor; of an expert without rows, whose gradient is zero, a small one."""
    return max(float(whole.abs().max()), 1e-5)


def loss_distance(found: Outcome, expected: Outcome) -> float:
    """The largest relative difference of the two losses of any step."""
    return relative(found.losses + found.cross_entropies, expected.losses + expected.cross_entropies)


def norm_distance(found: Outcome, expected: Outcome) -> float:
    """The largest relative difference of the gradient's norm of any step."""
    return relative(found.norms, expected.norms)


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference of two lists of equal length; what is no number is infinitely far."""
    there, here = (torch.tensor(values, dtype=torch.float64) for values in (found, expected))
    assert there.shape == here.shape
    return float(((there - here) / here).abs().max().nan_to_num(torch.inf))
