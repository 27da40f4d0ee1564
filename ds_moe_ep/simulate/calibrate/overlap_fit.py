"""Fits a host's costs to Records of the overlap benchmark, and tells the error on those held out of the fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record
from ds_moe_ep.schedule.shaping import WIRE
from ds_moe_ep.simulate.calibrate.overlap_case import PHASES, OverlapCase, overlap_cases, simulate_case
from ds_moe_ep.simulate.calibrate.search import Parameters, compass_search
from ds_moe_ep.simulate.cluster.cluster import Cluster

START = {  # by the path of the number; where the search begins
    "host.forward_us": 1e3,
    "host.backward_us": 1e3,
    "host.pairwise_us": 200.0,
    "host.collective_us": 200.0,
    "host.transfer_us": 300.0,
    "host.byte_us": 3e-3,
    "far.efficiency": 0.9,
    "device.peak_fp32": 5e4,
    "device.half_rows": 8.0,
}


@dataclass(frozen=True)
class CasePrediction:
    """One case: microseconds of a step, simulated and measured."""

    case: OverlapCase
    simulated_us: float

    @property
    def measured_us(self) -> float:
        return self.case.measured_us["step"]

    @property
    def error(self) -> float:
        """Relative to what was measured; positive where the simulation is slower."""
        return self.simulated_us / self.measured_us - 1


@dataclass(frozen=True)
class OverlapFit:
    """A cluster with fitted costs, what each number is, and how it does on the cases fitted and on those held out."""

    cluster: Cluster
    parameters: Parameters
    fitted: tuple[CasePrediction, ...]
    held_out: tuple[CasePrediction, ...]
    pairs: int  # of held-out cases on one shaping whose steps differ by more than their spreads
    pairs_in_order: int


def fit_overlap(cluster: Cluster, records: Iterable[Record], held_out: Callable[[OverlapCase], bool]) -> OverlapFit:
    """The cluster whose host and, where experts were real, device explain the cases that are not held out.

    The loss is the sum over forward and backward passes of log(simulated / measured)^2: relative errors count alike for
    fast and slow cases. Raises ConfigError where there are no cases, or none left to fit.
    """
    cases = overlap_cases(records)
    mine = [case for case in cases if not held_out(case)]
    if not mine:
        raise ConfigError(
            f"records: {len(cases)} cases of the overlap benchmark, none of them left to fit; measure with "
            "python -m ds_moe_ep bench overlap --out overlap.jsonl, or hold out fewer"
        )
    found = compass_search(lambda values: _loss(mine, with_parameters(cluster, values)), _start(mine))
    fitted = with_parameters(cluster, found)
    others = predictions([case for case in cases if held_out(case)], fitted)
    ordered = [is_right for _, _, is_right in pairs_in_order(others)]
    return OverlapFit(fitted, found, predictions(mine, fitted), others, len(ordered), sum(ordered))


def predictions(cases: Sequence[OverlapCase], cluster: Cluster) -> tuple[CasePrediction, ...]:
    """Every case's step on a cluster."""
    return tuple(CasePrediction(case, simulate_case(case, cluster)["step"]) for case in cases)


def pairs_in_order(found: Iterable[CasePrediction]) -> Iterator[tuple[OverlapCase, OverlapCase, bool]]:
    """Pairs of sides on one shaping that differ by more than their spreads, and whether they are predicted so."""
    places: dict[tuple[str, str], list[CasePrediction]] = {}
    for prediction in found:
        if prediction.case.side != WIRE:
            places.setdefault((prediction.case.device, prediction.case.shaping), []).append(prediction)
    for here in places.values():
        for one, other in combinations(here, 2):
            mine, its = one.case.measured["step"], other.case.measured["step"]
            if mine.spread[1] < its.spread[0] or its.spread[1] < mine.spread[0]:
                is_right = (one.simulated_us < other.simulated_us) == (mine.value < its.value)
                yield one.case, other.case, is_right


def with_parameters(cluster: Cluster, values: Parameters) -> Cluster:
    """The cluster with these numbers, by their paths; a share of a link stays a share."""
    changed: dict[str, dict[str, float]] = {}
    for path, value in values.items():
        part, name = path.split(".")
        changed.setdefault(part, {})[name] = min(value, 1.0) if name == "efficiency" else value
    return dataclasses.replace(
        cluster, **{part: dataclasses.replace(getattr(cluster, part), **numbers) for part, numbers in changed.items()}
    )


def _start(cases: Sequence[OverlapCase]) -> Parameters:
    """Numbers that the cases tell of: of links where some are shaped, of devices where some are real."""
    is_shaped = any(case.bandwidth is not None for case in cases)
    is_real = any(case.device == "real" and case.side != WIRE for case in cases)
    told = {"host": True, "far": is_shaped, "device": is_real}
    return {path: value for path, value in START.items() if told[path.split(".")[0]]}


def _loss(cases: Sequence[OverlapCase], cluster: Cluster) -> float:
    total = 0.0
    for case in cases:
        simulated = simulate_case(case, cluster)
        total += sum(math.log(simulated[phase] / case.measured_us[phase]) ** 2 for phase in PHASES)
    return total
