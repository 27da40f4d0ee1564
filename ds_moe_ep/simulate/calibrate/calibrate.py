"""From Records of runs to a cluster: what the probe measured, and what explains the overlap benchmark.

A share of the runs stays out of every fit, and the error on these is what a fit is believed by. Records of both may
come together: the probe's numbers are fitted first, and the overlap benchmark's costs beside them.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import percent
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.simulate.calibrate.overlap_case import OverlapCase, overlap_cases
from ds_moe_ep.simulate.calibrate.overlap_fit import CasePrediction, fit_overlap
from ds_moe_ep.simulate.calibrate.probe_fit import SamplePoint, fit_probe
from ds_moe_ep.simulate.calibrate.probe_samples import PREFIX
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.cluster.write import write_cluster

OVERLAP = "overlap."
FIX = "measure with python -m ds_moe_ep bench probe --out probe.jsonl, and name that file"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibrated cluster, which of its numbers were fitted, and how it does on what was measured."""

    base: Cluster
    cluster: Cluster
    fitted: tuple[str, ...]  # paths of numbers
    points: tuple[SamplePoint, ...]
    pairs: int = 0  # of held-out cases of the overlap benchmark that differ by more than their spreads
    pairs_in_order: int = 0


@dataclass(frozen=True)
class Errors:
    """Errors of a group of points: number, median and worst of the absolute relative errors."""

    number: int
    median: float
    worst: float


def calibrate_files(
    paths: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    hold_out: float = 0.5,
    precision: str | None = None,
) -> Calibration:
    """The calibration of the cluster in a file by Records in files; written to `out`, which it replaces at once."""
    records = read_all(paths)
    found = calibrate(records, load_cluster(base), hold_out=hold_out, precision=precision)
    if out is not None:
        names = ", ".join(Path(path).name for path in paths)
        share = percent(hold_out, 0)
        notes = f"Calibrated from {Path(base).name} by {names}; {share} of the runs were held out of the fit."
        write_cluster(out, found.cluster, notes)
    return found


def read_all(paths: Sequence[str | os.PathLike[str]]) -> list[Record]:
    """The Records of all files. Raises ConfigError for a file that cannot be read."""
    found: list[Record] = []
    for path in paths:
        try:
            found += read_records(Path(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise ConfigError(f"records={os.fspath(path)!r}: cannot be read ({reason}); {FIX}") from error
    return found


def calibrate(
    records: Sequence[Record], base: Cluster, *, hold_out: float = 0.5, precision: str | None = None
) -> Calibration:
    """The cluster `base` with numbers fitted to Records of the probe, of the overlap benchmark, or of both.

    Raises ConfigError where there are none of these kinds, too few to fit, or a unit is unknown.
    """
    if not 0 <= hold_out < 1:
        raise ConfigError(f"calibrate.hold_out={hold_out:g}: a share from 0 to less than 1; 0.5 is every second run")
    of_probe = [record for record in records if record.name.startswith(PREFIX)]
    of_overlap = [record for record in records if record.name.startswith(OVERLAP)]
    if not of_probe and not of_overlap:
        raise ConfigError(f"records: {len(records)}, none of the probe or of the overlap benchmark; {FIX}")
    found = Calibration(base=base, cluster=base, fitted=(), points=())
    if of_probe:
        fit = fit_probe(base, of_probe, hold_out, precision)
        found = dataclasses.replace(found, cluster=fit.cluster, fitted=fit.fitted, points=fit.points)
    return with_overlap(found, of_overlap, hold_out) if of_overlap else found


def with_overlap(found: Calibration, records: Sequence[Record], hold_out: float) -> Calibration:
    """The calibration with the costs that explain the overlap benchmark's cases."""
    held_out = held_out_cases(overlap_cases(records), hold_out)
    fit = fit_overlap(found.cluster, records, lambda case: case.name in held_out)
    paths = tuple(fit.parameters)
    source = f"overlap benchmark {records[0].commit}, {records[0].hardware}, {len(fit.fitted)} cases"
    cluster = dataclasses.replace(
        fit.cluster,
        sources={**fit.cluster.sources, **dict.fromkeys(paths, source)},
        ranges={path: pair for path, pair in fit.cluster.ranges.items() if path not in paths},
    )
    points = [*_points(fit.fitted, is_held_out=False), *_points(fit.held_out, is_held_out=True)]
    return dataclasses.replace(
        found,
        cluster=cluster,
        fitted=tuple(dict.fromkeys([*found.fitted, *paths])),
        points=(*found.points, *points),
        pairs=fit.pairs,
        pairs_in_order=fit.pairs_in_order,
    )


def held_out_cases(cases: Iterable[OverlapCase], share: float) -> set[str]:
    """The names of the cases that stay out: a share of them, by a hash that spares no kind of case."""
    names = sorted({case.name for case in cases}, key=lambda name: zlib.crc32(name.encode()))
    return set(names[: int(share * len(names))])


def _points(predictions: Iterable[CasePrediction], *, is_held_out: bool) -> list[SamplePoint]:
    return [
        SamplePoint(
            f"overlap benchmark, {prediction.case.device} devices",
            f"{prediction.case.shaping}, {prediction.case.side}",
            "ms",
            prediction.simulated_us / 1e3,
            prediction.measured_us / 1e3,
            is_held_out,
        )
        for prediction in predictions
    ]


def errors_of(points: Iterable[SamplePoint]) -> Errors | None:
    """Median and worst error; None for no points."""
    errors = [abs(point.error) for point in points]
    return Errors(len(errors), statistics.median(errors), max(errors)) if errors else None
