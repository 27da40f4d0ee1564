"""Simulations of the test bed against what was measured there and no fit has seen (examples/testbed)."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.schedule.shaping import WIRE
from ds_moe_ep.schedule.spans import overlap
from ds_moe_ep.simulate.calibrate.calibrate import calibrate, held_out_cases
from ds_moe_ep.simulate.calibrate.overlap_case import OverlapCase, overlap_cases, simulate_case, simulate_pass
from ds_moe_ep.simulate.calibrate.overlap_fit import fit_overlap, pairs_in_order, predictions
from ds_moe_ep.simulate.cluster.cluster import Cluster, Host, load_cluster
from tests.policy.sources import ROOT

HOLD_OUT = 0.75  # as README's command says
BED = load_cluster(ROOT / "ds_configs" / "clusters" / "testbed_4x4.json")
BOUNDS = {"emulated": 0.10, "real": 0.20}


@cache
def records() -> tuple[Record, ...]:
    folder = ROOT / "examples" / "testbed"
    return tuple(record for kind in BOUNDS for record in read_records(folder / f"overlap_{kind}.jsonl"))


@cache
def held_out() -> tuple[OverlapCase, ...]:
    cases = overlap_cases(records())
    names = held_out_cases(cases, HOLD_OUT)
    return tuple(case for case in cases if case.name in names)


def errors(device: str, cluster: Cluster = BED) -> dict[str, float]:
    """Of every schedule that no fit has seen."""
    mine = [case for case in held_out() if case.device == device and case.side != WIRE]
    return {prediction.case.name: prediction.error for prediction in predictions(mine, cluster)}


@pytest.mark.parametrize("device", BOUNDS)
def test_steps_that_no_fit_has_seen_are_foretold_within_the_bound(device: str) -> None:
    found = errors(device)
    assert len(found) >= 14
    assert {name: error for name, error in found.items() if abs(error) > BOUNDS[device]} == {}


@pytest.mark.parametrize("device", BOUNDS)
def test_a_bed_with_half_the_links_or_without_a_host_would_miss_them(device: str) -> None:
    slower = dataclasses.replace(BED, far=dataclasses.replace(BED.far, efficiency=BED.far.efficiency / 2))
    free = dataclasses.replace(BED, host=Host(cores=BED.host.cores))
    worst = [max(abs(error) for error in errors(device, cluster).values()) for cluster in (slower, free)]
    assert worst[0] > 2 * BOUNDS[device]
    assert worst[1] > (0.5 if device == "real" else 0.1)


def test_which_schedule_is_faster_is_foretold_in_nine_of_ten_pairs() -> None:
    pairs = list(pairs_in_order(predictions(held_out(), BED)))
    right = [is_right for _, _, is_right in pairs]
    assert len(pairs) >= 50
    assert sum(right) >= 0.9 * len(pairs)


def test_what_would_be_chosen_takes_at_most_an_eighth_longer_than_the_best_measured() -> None:
    places: dict[tuple[str, str], list[OverlapCase]] = {}
    for case in overlap_cases(records()):
        if case.side != WIRE:
            places.setdefault((case.device, case.shaping), []).append(case)
    for here in places.values():
        chosen = min(here, key=lambda case: simulate_case(case, BED)["step"])
        assert chosen.measured_us["step"] <= 1.125 * min(case.measured_us["step"] for case in here), chosen.name


def test_the_hidden_share_is_foretold_where_devices_are_emulated() -> None:
    """Within 12 points of the measured mean rank; the serial schedule hides nothing in both."""
    by_name = {record.name: record.value for record in records()}
    for case in overlap_cases(records()):
        if case.device == "emulated" and case.side != WIRE:
            spans = [simulate_pass(case, BED, phase)[1] for phase in ("forward", "backward")]
            total, exposed = (
                sum(
                    getattr(overlap(s for s in one if s.lane in ("compute", "dispatch", "combine")), what)
                    for one in spans
                )
                for what in ("total_us", "exposed_us")
            )
            measured = by_name[f"overlap.emulated.{case.shaping}.{case.side}.step.hidden"]
            assert 100 * (1 - exposed / total) == pytest.approx(measured, abs=12), case.name


def test_the_fit_has_seen_a_quarter_of_the_cases_and_no_other() -> None:
    cases = overlap_cases(records())
    assert len(cases) == 56
    assert len(held_out()) == 42


def test_cases_say_their_links_by_hand() -> None:
    cases = {case.name: case for case in overlap_cases(records())}
    assert cases["real 100 mbit serial"].bandwidth == pytest.approx(12.5)
    assert cases["real unshaped serial"].bandwidth is None
    # 0.6 x 3 s for 4 exchanges of 4 ranks x 768 rows x 1 KiB, with 8 % of headers
    assert cases["emulated 0.6 of step serial"].bandwidth == pytest.approx(4 * 4 * 768 * 1024 * 1.08 / 1.8e6)


def test_passes_are_scaled_so_that_they_sum_to_the_step() -> None:
    for case in overlap_cases(records()):
        measured = case.measured_us
        assert measured["forward"] + measured["backward"] == pytest.approx(measured["step"])


def test_records_of_uneven_routing_are_refused() -> None:
    odd = [dataclasses.replace(record, command=record.command + " --case k1_skewed") for record in records()]
    with pytest.raises(ConfigError, match="only even routing"):
        overlap_cases(odd)


def test_a_fit_finds_the_costs_that_made_synthetic_records() -> None:
    """Records as if a bed with other costs had been measured: every step is met again, also those held out."""
    truth = dataclasses.replace(
        BED, host=dataclasses.replace(BED.host, collective_us=150.0, pairwise_us=250.0, transfer_us=600.0)
    )
    some = [case for case in overlap_cases(records()) if case.name.startswith("emulated 0.6")]
    made = []
    for case in some:
        for phase, time_us in simulate_case(case, truth).items():
            value = time_us / 1e3
            made.append(dataclasses.replace(case.measured[phase], value=value, spread=(value, value)))
    fit = fit_overlap(BED, made, lambda case: case.side not in ("serial", "peers"))
    assert all(abs(prediction.error) < 0.02 for prediction in (*fit.fitted, *fit.held_out))
    assert fit.cluster.far.efficiency == pytest.approx(truth.far.efficiency, rel=0.05)
    with pytest.raises(ConfigError, match="none of them left to fit"):
        fit_overlap(BED, made, lambda case: True)


@pytest.mark.slow
def test_the_shipped_bed_is_what_the_command_of_the_readme_makes() -> None:
    found = calibrate(list(records()), BED, hold_out=HOLD_OUT).cluster
    for part in ("host", "far", "device"):
        for name, value in vars(getattr(found, part)).items():
            shipped = getattr(getattr(BED, part), name)
            assert (math.isinf(value) and math.isinf(shipped)) or value == pytest.approx(shipped, rel=1e-3), name
