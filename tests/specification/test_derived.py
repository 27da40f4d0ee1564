"""The specification's figures: derived numbers by hand, and verdicts that turn with the numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ds_moe_ep.records.names import LAWS
from ds_moe_ep.specification.claim import Figure
from ds_moe_ep.specification.claims import RATIO, stated_and_derived
from ds_moe_ep.specification.laws import STATED_R2
from ds_moe_ep.specification.stated import HARDWARE, STATED

# The derived numbers as the specification's checked figures give them, worked out by hand.
DERIVED = {
    "one expert": ("536.9 M", "1,074 MB"),
    "memory of a GPU, EP16": ("39.5 GB",),
    "memory of a GPU, TP8/PP2": ("4.43 GB",),
    "activations of one batch at one expert": ("41.9 GB",),
    "tokens of an expert": ("640,000",),
    "distribution of tokens": ("26.2 ms", "39.3 ms", "157 ms"),
    "expert computation": ("695 ms",),
    "communication hidden": ("10 %", "all of it"),
    "tokens per second, TP8/PP2 and EP16": ("2.23 M", "743 k", "7.10", "21.3"),
    RATIO: ("3.75",),
    "batches per second": ("0.0117", "0.0439"),
    "time per token (TPOT)": ("8.33", "2.22 us"),
    "latency pieces, TP8/PP2": ("8.30 ms",),
    "latency pieces, EP16": ("0.75 ms",),
    "gain in GPU efficiency": ("50.8 %",),
    "utilization, TP8/PP2 and EP16": ("16 %", "61 %"),
    "bytes per GPU and layer, forward, TP8 and EP16": ("587 GB", "19.7 GB"),
    "pipeline bubble, 2 stages, 4 micro-batches": ("20 %",),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("issue order",),
    "R\u00b2 of TPS ~ EP": ("1 on links that cost nothing",),
    "R\u00b2 of TPOT ~ 1/EP": ("1 on links that cost nothing",),
    "R\u00b2 of utilization ~ 1 - 1/EP": ("0 at EP=1",),
    "R\u00b2 of memory per expert ~ 1/EP": ("1.000",),
}
# (figure, what is stated instead, the verdict as it is, the verdict then)
TURNS: list[tuple[str, dict[str, Any], str, str]] = [
    ("expert", {"expert_mb": 1074.0}, "counts parameters, not bytes", "holds"),
    ("memory_ep16", {"ep16_memory_mb": 39_500.0}, "impossible: the weights alone are 9.7 times as much", "possible"),
    ("memory_tp8_pp2", {"base_memory_gb": 4.43}, "close: 22 % more", "holds"),
    ("expert_tokens", {"expert_tokens": 320_000}, "holds", "does not hold"),
    ("distribution", {"distribution_ms": 40.0}, "holds only if no byte leaves a node", "possible"),
    ("distribution", {"distribution_ms": 10.0}, "holds only", "impossible: a link per GPU takes 3.9 times as much"),
    ("expert_time", {"expert_ms": 1000.0}, "impossible: 139 times the peak", "possible: 69 % of the peak"),
    ("hidden", {"expert_ms": 50.0}, "contradicts the stated times, which allow 10 %", "possible"),
    ("tps", {"tps": (120_000, 800_000)}, "450 k is 61 % of peak in training", "impossible: 1.1 times peak in training"),
    ("ratio", {"ratio": 3.0}, "holds", "does not hold: stated is 0.8 times"),
    ("batches", {"batches_per_s": (0.0117, 0.0439)}, "off by 1,000", "holds"),
    ("tpot", {"tpot_ms": (0.0083, 0.0022)}, "off by 1,000", "holds"),
    ("pieces_tp8_pp2", {"base_pieces_ms": (2.1, 4.1, 0.0)}, "consistent with itself", "does not add up: 75 %"),
    ("pieces_ep16", {"ep16_pieces_ms": (0.31, 1.89, 0.0)}, "does not add up: 34 %", "consistent with itself"),
    ("gain", {"gain_percent": 33.0}, "holds", "does not hold"),
    ("utilization", {"tps": (120_000, 740_000)}, "possible as shares of time busy", "contradicts"),
]


def by_key(figures: tuple[Figure, ...]) -> dict[str, Figure]:
    return {figure.key: figure for figure in figures}


def test_every_derived_figure_is_the_one_worked_out_by_hand() -> None:
    found = {figure.name: figure.derived for figure in stated_and_derived()}
    assert found.keys() == DERIVED.keys()
    for name, texts in DERIVED.items():
        for text in texts:
            assert text in found[name], name


def test_the_numbers_behind_the_texts_are_the_ones_worked_out_by_hand() -> None:
    numbers = {(f.key, n.what): (n.stated, n.derived, n.unit) for f in stated_and_derived() for n in f.numbers}
    assert len(numbers) == sum(len(figure.numbers) for figure in stated_and_derived())
    # 2 * 8,192 * 32,768 parameters of 2 bytes; 640,000 rows * 8,192 * 2 bytes at 400 GB/s, 12 of 16 at 200 GB/s
    assert numbers["expert", "bytes"] == (537e6, 2 * 2 * 8192 * 32768, "bytes")
    assert numbers["distribution", "inside_a_node"] == (26.2, pytest.approx(26.2144), "ms")
    assert numbers["distribution", "link_a_node"] == (None, pytest.approx(4 * 39.3216), "ms")
    assert numbers["expert_time", "forward"] == (5.0, pytest.approx(640e3 * 4 * 8192 * 32768 / 989e9), "ms")
    assert numbers["tps", "ep16"][:2] == (450_000, pytest.approx(743e3, rel=1e-3))
    assert numbers["utilization", "ep16"][1] == pytest.approx(450 / 743, rel=1e-3)
    assert numbers["tpot", "ep16"] == (2200.0, pytest.approx(1e6 / 450e3), "us")


@pytest.mark.parametrize(("key", "changes", "verdict", "turned"), TURNS, ids=[turn[0] for turn in TURNS])
def test_a_verdict_turns_with_the_numbers(key: str, changes: dict[str, Any], verdict: str, turned: str) -> None:
    assert verdict in by_key(stated_and_derived())[key].verdict
    other = by_key(stated_and_derived(dataclasses.replace(STATED, **changes)))[key]
    assert turned in other.verdict
    assert verdict not in other.verdict


def test_verdicts_turn_with_the_hardware() -> None:
    faster = dataclasses.replace(HARDWARE, peak_flops=200 * HARDWARE.peak_flops, memory_bytes=160e9)
    found = by_key(stated_and_derived(STATED, faster))
    assert found["expert_time"].verdict == "possible: 69 % of the peak"  # 694.7 ms / 200 of 5.0 ms
    assert found["activations"].verdict == "fits in one piece"
    slower = dataclasses.replace(HARDWARE, peak_flops=HARDWARE.peak_flops / 2)
    assert by_key(stated_and_derived(STATED, slower))["tps"].verdict == "impossible: 1.2 times peak in training"


def test_the_stated_fits_are_those_that_the_report_prints() -> None:
    assert dict(zip(LAWS, STATED.r2, strict=True)) == STATED_R2


def test_every_figure_has_a_name_a_key_and_a_verdict_of_its_own() -> None:
    figures = stated_and_derived()
    assert len({figure.key for figure in figures}) == len({figure.name for figure in figures}) == len(figures)
    assert all(figure.verdict and figure.stated and figure.derived for figure in figures)
