"""The page in examples/report is what `report` draws from the Records beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import main
from tests.policy.sources import ROOT

PAGE = ROOT / "examples" / "report"
ORIGINS = ("from the table, rounded as there", "read back from the figure")


@pytest.mark.slow
def test_the_page_is_drawn_again_from_its_records(tmp_path: Path) -> None:
    records = sorted(map(str, (PAGE / "records").glob("*.jsonl")))
    assert main(["report", *records, "--out", str(tmp_path)]) == 0
    names = sorted(path.relative_to(PAGE) for path in PAGE.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / "report.md").read_text() == (PAGE / "report.md").read_text()
    for figure in (PAGE / "figures").glob("*.svg"):
        assert (tmp_path / "figures" / figure.name).read_bytes() == figure.read_bytes(), figure.name


def test_each_record_of_the_page_says_where_its_number_was_read() -> None:
    lines = [
        json.loads(line)
        for path in (PAGE / "records").glob("*.jsonl")
        if not path.name.endswith(".spans.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert lines and all(line["notes"].endswith(ORIGINS) for line in lines)
