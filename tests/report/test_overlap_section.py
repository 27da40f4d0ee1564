"""The section on schedules: the overlap benchmark's Records that ship with the examples, drawn and tabulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_moe_ep.records.record import read_records
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings, Source, read_findings
from ds_moe_ep.report.known_names import is_known
from ds_moe_ep.report.page import Drawing, Picture
from ds_moe_ep.report.plots.overlap import LinkPanel
from ds_moe_ep.report.sections import overlap as sections_overlap
from ds_moe_ep.report.sections.overlap import overlap
from tests.policy.sources import ROOT
from tests.report.sample_records import overlap_records, record

FILES = [ROOT / "examples" / "testbed" / f"overlap_{device}.jsonl" for device in ("emulated", "real")]


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[LinkPanel]:
    """The panels that are drawn."""
    seen: list[LinkPanel] = []

    def keep(drawn: list[LinkPanel], titles: object) -> Drawing:
        seen.extend(drawn)
        return Drawing(b"", b"", bytes)

    monkeypatch.setattr(sections_overlap, "draw_overlap", keep)
    return seen


def test_the_examples_records_are_all_known_and_drawn_over_ratios_and_links(panels: list[LinkPanel]) -> None:
    assert [r.name for path in FILES for r in read_records(path) if not is_known(r.name)] == []
    section = overlap(read_findings(FILES))
    assert section is not None
    assert [type(block) for block in section.blocks] == [Picture, Table, Table]
    time, hidden, real, _ = panels
    assert (time.title, hidden.title) == ("emulated devices: time", "emulated devices: hidden behind compute")
    assert list(time.places) == [0.3, 0.6, 1.0, 2.0] and list(time.links) == ["0.3", "0.6", "1", "2"]
    assert list(real.links) == ["100 Mbit/s", "400 Mbit/s", "2000 Mbit/s", "unshaped"]
    assert {"serial", "auto", "peers", "8 chunks", "wire"} <= set(time.sides) and "wire" not in hidden.sides
    assert time.sides["serial"][0].value == pytest.approx(4.016030757)
    assert hidden.sides["peers"][0].value == pytest.approx(95.33930428)


def test_the_table_has_a_column_for_each_link_and_dashes_where_nothing_was_measured(panels: list[LinkPanel]) -> None:
    records = [r for r in overlap_records() if r.name != "overlap.real.400 mbit.peers.step.time"]
    section = overlap(Findings((Source(Path("x.jsonl"), tuple(records)),)))
    assert section is not None
    real = section.blocks[2]
    assert isinstance(real, Table)
    assert real.head == ("schedule", "400 Mbit/s", "unshaped")
    assert real.rows[0] == ("serial", "4,100\n0 %", "4,000\n0 %")
    assert real.rows[1] == ("peers", "\u2013", "3,100\n95.0 %")
    assert real.rows[2] == ("traffic alone", "1,150", "1,050")


def test_passes_alone_make_no_section_and_strange_shapings_are_not_known() -> None:
    alone = record("overlap.real.400 mbit.peers.forward.time", 1.0, "ms")
    assert is_known(alone.name) and overlap(Findings((Source(Path("x.jsonl"), (alone,)),))) is None
    for name in ("overlap.real.fast.peers.step.time", "overlap.moon.unshaped.peers.step.time", "overlap.real.time"):
        assert not is_known(name)
