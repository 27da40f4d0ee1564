"""A search for the parameters that explain measurements best, without derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Parameters = dict[str, float]
BETTER = 1e-4  # share of the loss by which a step must lower it: a parameter that nothing tells of stays where it is


def compass_search(
    loss: Callable[[Parameters], float],
    start: Mapping[str, float],
    *,
    factor: float = 1.6,
    tolerance: float = 1.005,
) -> Parameters:
    """Positive parameters at a local minimum of `loss` (Kolda, Lewis, Torczon, SIAM Review 45, 2003, section 1.1).

    Each is multiplied and divided by a factor in turn; a value that is clearly better is kept. Where none is, the
    factor becomes its square root, until it is below `tolerance`. Deterministic; a start of 0 stays 0.
    """
    best, lowest = dict(start), loss(dict(start))
    while factor > tolerance:
        improved = False
        for name in start:
            for step in (factor, 1 / factor):
                tried = {**best, name: best[name] * step}
                found = loss(tried)
                if found < lowest * (1 - BETTER):
                    best, lowest, improved = tried, found, True
                    break
        if not improved:
            factor **= 0.5
    return best
