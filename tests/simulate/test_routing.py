"""Loads are shares of the mean: even, by Zipf's law, or as they were counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record, write_records
from ds_moe_ep.simulate.job.routing import loads_of, read_rows, zipf


def test_even_is_no_load_at_all() -> None:
    assert read_rows("even", 16) == []


def test_zipf_by_hand() -> None:
    assert zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    first, second = 2 * (1 + 1 / 2) / (25 / 12), 2 * (1 / 3 + 1 / 4) / (25 / 12)
    assert loads_of(read_rows("zipf:1", 4), 2) == pytest.approx((first, second))
    assert loads_of(read_rows("zipf:0", 16), 16) == pytest.approx((1.0,) * 16)


def test_consecutive_experts_lie_on_one_rank() -> None:
    assert loads_of([6, 2, 1, 1, 0, 0], 3) == pytest.approx((2.4, 0.6, 0.0))


def test_a_list_of_rows_and_records_of_a_run_say_the_same(tmp_path: Path) -> None:
    rows = [10, 20, 30, 40]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    records = [
        Record(
            name=f"system.loopback.training.ep16.load.step{step}.layer{layer}.expert{expert}",
            value=value * (1 if (step, layer) == (9, 0) else 7 + expert),
            unit="rows",
            spread=(value * (1 if (step, layer) == (9, 0) else 7 + expert),) * 2,
            n=1,
            command="x",
            commit="x",
            hardware="x",
            emulated=False,
        )
        for step in (1, 9)
        for layer in (0, 1)
        for expert, value in enumerate(rows)
    ]
    write_records(tmp_path / "run.jsonl", records)
    expected = pytest.approx((0.4, 0.8, 1.2, 1.6))
    assert loads_of(read_rows(str(tmp_path / "rows.json"), 4), 4) == expected
    assert loads_of(read_rows(str(tmp_path / "run.jsonl"), 4), 4) == expected, "the last step's first layer counts"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zipf:steep", "no exponent"),
        ("zipf:-1", "0 (even) or more"),
        ("nowhere.json", "cannot be read"),
        ("even:2", "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loads_of(read_rows(text, 16), 16)
    assert words in str(error.value)


def test_files_of_another_layer_are_refused(tmp_path: Path) -> None:
    refused = {"[1, 2]": "rows of 2 experts", "[0, 0, 0, 0]": "some expert has one", "[1, ": "no JSON"}
    refused |= {"[1, 2, NaN, 4]": "some expert has one", "[1, 2, 1e999, 4]": "some expert has one"}
    for content, words in refused.items():
        (tmp_path / "rows.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            loads_of(read_rows(str(tmp_path / "rows.json"), 4), 4)
