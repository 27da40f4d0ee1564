"""The section on simulated scaling: its pictures, its tables, and the files that `plan --sweep` draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ds_moe_ep.records.names import LAWS
from ds_moe_ep.records.record import Record, write_records
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings, Source
from ds_moe_ep.report.page import SIMULATED, PageSection, Picture
from ds_moe_ep.report.plots.sweep import thousands
from ds_moe_ep.report.sections.stated import stated
from ds_moe_ep.report.sections.sweep import draw_curves, simulated_scaling
from tests.report.sample_records import SWEPT, scaling_records, sweep_records

OVER_EP = [(ep, dp) for ep, dp in SWEPT if dp == 1]
OVER_COPIES = [(ep, dp) for ep, dp in SWEPT if ep == 16]


def section_of(records: Sequence[Record]) -> PageSection | None:
    return simulated_scaling(Findings((Source(Path("some.jsonl"), tuple(records)),)))


def keys_of(section: PageSection | None) -> list[str]:
    assert section is not None
    return [block.key for block in section.blocks if isinstance(block, Picture)]


def test_a_sweep_over_ep_and_one_over_copies_have_a_picture_each() -> None:
    assert keys_of(section_of(list(sweep_records()))) == ["sweep_simulated_some", "sweep_copies_simulated_some"]
    assert keys_of(section_of(list(sweep_records(sizes=OVER_EP)))) == ["sweep_simulated_some"]
    assert keys_of(section_of(list(sweep_records(sizes=OVER_COPIES)))) == ["sweep_copies_simulated_some"]
    assert section_of(list(scaling_records())) is None, "what was measured is not shown as simulated"


def test_the_numbers_of_an_axis_that_doubles_are_short() -> None:
    values = (0.01, 0.1, 1, 100, 10_000, 1e6, 2e7, 1e10)
    assert [thousands()(value) for value in values] == ["0.01", "0.1", "1", "100", "10 k", "1 M", "20 M", "10 G"]


def test_two_clusters_stand_apart() -> None:
    section = section_of([*sweep_records(sizes=OVER_EP), *sweep_records("simulated_other", OVER_EP)])
    assert keys_of(section) == ["sweep_simulated_other", "sweep_simulated_some"]


def test_the_tables_have_every_point_and_the_stated_fits() -> None:
    section = section_of(list(sweep_records()))
    assert section is not None
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [len(table.rows) for table in tables] == [len(SWEPT), len(SWEPT), len(LAWS)]
    assert tables[0].rows[0][:3] == ("1", "1", "20,000") and tables[0].rows[0][7] == "\u2013"
    assert tables[0].rows[-1][:3] == ("1024", "1", "20,480,000")
    assert tables[2].rows[0] == ("TPS ~ EP", "0.97", "0.991", "0.991")
    assert all(SIMULATED in table.basis for table in tables)


def test_the_specifications_table_tells_measured_and_simulated_fits_apart() -> None:
    records = (*scaling_records(), *sweep_records())
    section = stated(Findings((Source(Path("some.jsonl"), records),)))
    assert section is not None
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    row = dict(zip(table.head, next(row for row in table.rows if row[0] == "R\u00b2 of TPS ~ EP"), strict=True))
    assert row["stated"] == "0.97" and "0.984" in row["measured here"] and "0.991" in row["simulated"]


def test_curves_are_written_beside_their_records(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    write_records(path, sweep_records())
    written = draw_curves(path)
    assert [its.name for its in written] == ["sweep.png", "sweep.svg", "sweep_copies.png", "sweep_copies.svg"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall("<path", (tmp_path / "sweep.svg").read_text(encoding="utf-8"))) > 50
    write_records(path, scaling_records())
    assert draw_curves(path) == []
