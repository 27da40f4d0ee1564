"""Records of the probe as samples in a cluster's units, and the line through them.

Names are those of records/names.py: `probe.matmul.<precision>.rows<n>`, `probe.<way>.<load>.bytes<n>` and the like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.cluster.cluster import SCALES

PREFIX = "probe."
STEADY = 0.05  # relative spread below which all points count alike


@dataclass(frozen=True)
class Sample:
    """A Record in the units of a cluster's fields, at a size: rows, bytes, or 0 where there is none."""

    size: float
    low: float
    value: float
    high: float
    source: str


@dataclass(frozen=True)
class FittedLine:
    """y = start + slope*x, neither below 0; the ends are the lines through lower and through upper quartiles."""

    start: float
    slope: float
    starts: tuple[float, float]
    slopes: tuple[float, float]
    residual: float  # the median of what the line leaves, relative


def samples_below(records: Iterable[Record], prefix: str, kind: str) -> list[Sample]:
    """The samples whose names begin with `probe.<prefix>`, by size; of two of one name the later one.

    Raises ConfigError for a unit that is none of `kind` in cluster.SCALES.
    """
    named = {record.name: record for record in records if f"{record.name}.".startswith(f"{PREFIX}{prefix}.")}
    return sorted((_sample(record, kind) for record in named.values()), key=lambda sample: sample.size)


def one_sample(records: Iterable[Record], name: str, kind: str) -> Sample | None:
    """The sample of one name, None where it was not measured."""
    found = samples_below(records, name, kind)
    return found[-1] if found else None


def _sample(record: Record, kind: str) -> Sample:
    scales = SCALES[kind]
    if record.unit not in scales:
        raise ConfigError(
            f"{record.name}.unit={record.unit!r}: no unit of this; it needs one of {', '.join(map(repr, scales))}"
        )
    last = record.name.rsplit(".", 1)[1]
    size = last.removeprefix("rows").removeprefix("bytes")
    low, value, high = (number * scales[record.unit] for number in (record.spread[0], record.value, record.spread[1]))
    if not low > 0 and size.isdigit():
        raise ConfigError(f"{record.name}={record.spread[0]:g}: a time or a rate is more than 0; measure again")
    source = f"probe {record.commit}, {record.hardware}"
    return Sample(float(size) if size.isdigit() else 0.0, low, value, high, source)


def is_held_out(index: int, share: float) -> bool:
    """True where the index-th of a row of sizes is held out of a fit, so that `share` of them are, evenly spread."""
    return math.floor((index + 1) * share) > math.floor(index * share)


def split(samples: Sequence[Sample], share: float, what: str) -> list[Sample]:
    """The samples that are fitted. Raises ConfigError where they are too few for a line."""
    fitted = [sample for index, sample in enumerate(samples) if not is_held_out(index, share)]
    if len(fitted) < 2:
        raise ConfigError(
            f"records: {what} was measured at {len(samples)} sizes, of which {len(fitted)} are left to fit, and a line "
            "needs 2; probe for longer (--seconds) or hold out fewer (--hold-out 0)"
        )
    return fitted


def fit_line(points: Sequence[tuple[float, tuple[float, float, float]]]) -> FittedLine:
    """The line through (x, (low, y, high)) with the least squares of relative errors, in closed form.

    An error counts in units of the point's own spread, half of its quartiles' distance, and STEADY at least: what was
    disturbed while it was measured decides little.
    """
    spreads = [max(STEADY, (high - low) / (2 * y)) for _, (low, y, high) in points]
    low, middle, high = ([(x, ys[index]) for x, ys in points] for index in range(3))
    start, slope = least_squares(middle, spreads)
    ends = (least_squares(low, spreads), (start, slope), least_squares(high, spreads))
    leaves = sorted(abs((start + slope * x) / y - 1) for x, y in middle)
    starts, slopes = sorted(end[0] for end in ends), sorted(end[1] for end in ends)
    return FittedLine(start, slope, (starts[0], starts[-1]), (slopes[0], slopes[-1]), leaves[len(leaves) // 2])


def least_squares(points: Sequence[tuple[float, float]], spreads: Sequence[float]) -> tuple[float, float]:
    """(a, b), both at least 0, with the least sum of (((a + b*x)/y - 1)/spread)^2."""
    weights = [1 / (y * spread) ** 2 for (_, y), spread in zip(points, spreads, strict=True)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    w, wx, wxx, wy, wxy = (
        math.fsum(weight * x**i * y**j for weight, x, y in zip(weights, xs, ys, strict=True))
        for i, j in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
    )
    determinant = w * wxx - wx**2
    start, slope = (wy * wxx - wx * wxy) / determinant, (w * wxy - wx * wy) / determinant
    if start < 0:
        return 0.0, wxy / wxx
    return (start, slope) if slope >= 0 else (wy / w, 0.0)
