"""A value as it is exactly, and as it comes out where everything is moved by one unit in the last place.

The distance between the two is what rounding may do: found by moving, not guessed. `ROUNDINGS` of these are allowed,
since an expert is a chain of some eight rounded operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.records.quantity import number

ROUNDINGS = 8.0
SEED = 1


@dataclass
class ExactAndMoved:
    """An exact value and the same with everything moved by a unit in the last place, in a wide type."""

    exact: Tensor
    moved: Tensor

    def distance(self, found: Tensor) -> float:
        """The 2-norm of what is wrong in `found`."""
        return float((found.to(self.exact) - self.exact).norm())

    @property
    def bound(self) -> float:
        """The distance that rounding explains."""
        tiny = float(torch.finfo(torch.float32).tiny)
        return ROUNDINGS * float((self.moved - self.exact).norm()) + tiny

    @property
    def size(self) -> float:
        """The 2-norm of the exact value."""
        return float(self.exact.norm())

    def differs(self, found: Tensor) -> str:
        """The difference of `found` in words; an empty string where rounding explains it."""
        distance = self.distance(found)
        if distance <= self.bound:
            return ""
        off, size, bound = (number(each, significant=2) for each in (distance, self.size, self.bound))
        return f"off by {off} of {size}, rounding explains {bound}"

    def span(self, start: int, num_values: int) -> ExactAndMoved:
        """A span of both, flat."""
        stop = start + num_values
        return ExactAndMoved(self.exact.flatten()[start:stop], self.moved.flatten()[start:stop])

    def __add__(self, other: ExactAndMoved) -> ExactAndMoved:
        return ExactAndMoved(self.exact + other.exact, self.moved + other.moved)

    def __iadd__(self, other: ExactAndMoved) -> ExactAndMoved:
        self.exact, self.moved = self.exact + other.exact, self.moved + other.moved
        return self


def moved(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each number moved up or down by one unit in the last place of a type, at random."""
    signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8).to(values) * 2 - 1
    return values + values * signs * torch.finfo(dtype).eps
