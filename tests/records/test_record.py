"""Records: one line of evidence is written, read back equal, and refused when it cannot be true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record, read_records, write_records


def record(**changes: object) -> Record:
    values: dict[str, object] = {
        "name": "layer.k1_even.native.time",
        "value": 12.5,
        "unit": "ms",
        "spread": (11.0, 14.0),
        "n": 18,
        "command": "python -m ds_moe_ep.bench.layer --rounds 20",
        "commit": "0123abc",
        "hardware": "2 cores",
        "emulated": False,
        "notes": "größer als 10",
    }
    return Record(**(values | changes))  # type: ignore[arg-type]


def test_records_come_back_equal_from_a_file(tmp_path: Path) -> None:
    records = [record(), record(name="layer.k1_even.native.bytes", value=3, spread=(3, 3), unit="bytes", n=1)]
    path = tmp_path / "records.jsonl"
    assert write_records(path, records) == 2
    assert list(read_records(path)) == records
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_appending_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record()])
    write_records(path, [record(n=3)], append=True)
    assert [found.n for found in read_records(path)] == [18, 3]


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"value": float("nan")}, "record.value=nan"),
        ({"value": True}, "record.value=True"),
        ({"value": 15.0}, "record.spread=(11.0, 14.0)"),
        ({"spread": (14.0, 11.0)}, "record.spread=(14.0, 11.0)"),
        ({"spread": (12.5,)}, "record.spread=(12.5,)"),
        ({"spread": (0.0, float("inf"))}, "finite"),
        ({"n": 0}, "record.n=0"),
        ({"n": 1.5}, "record.n=1.5"),
        ({"unit": " "}, "record.unit=' '"),
        ({"commit": None}, "record.commit=None"),
        ({"emulated": "no"}, "record.emulated='no'"),
        ({"notes": "two\nlines"}, "record.notes="),
    ],
)
def test_a_record_that_cannot_be_true_is_refused_by_field(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        record(**changes)
    assert says in str(refused.value)


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(record().to_json() + "\n\n" + '{"name": "cut of', encoding="utf-8")
    lines = read_records(path)
    next(lines)
    with pytest.raises(ConfigError, match=r"records\.jsonl:3"):
        next(lines)


def test_unknown_and_missing_keys_are_refused_by_name() -> None:
    values = json.loads(record().to_json())
    with pytest.raises(ConfigError, match="did you mean 'commit'"):
        Record.from_json(json.dumps(values | {"comit": "x"}))
    del values["hardware"]
    with pytest.raises(ConfigError, match=r"record\.hardware: missing"):
        Record.from_json(json.dumps(values))
    with pytest.raises(ConfigError, match="an object"):
        Record.from_json("[1]")
