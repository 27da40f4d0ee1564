"""The section on layouts: which one wins at which link, measured and simulated, and when none is told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings, Source
from ds_moe_ep.report.page import PageSection
from ds_moe_ep.report.plots.layouts import styles_of
from ds_moe_ep.report.sections.layouts import layouts
from tests.report.sample_records import BY_TRAFFIC, layout_records, record


def section_of(records: Sequence[Record]) -> PageSection | None:
    return layouts(Findings((Source(Path("some.jsonl"), tuple(records)),)))


def rows_of(records: Sequence[Record]) -> list[tuple[str, ...]]:
    section = section_of(records)
    assert section is not None
    return [row for block in section.blocks if isinstance(block, Table) for row in block.rows]


def measured(tps: dict[str, float], ratio: float, spread: float = 0.01) -> list[Record]:
    """Layouts of one environment as the benchmark of systems writes them."""
    environment = f"system.traffic{round(100 * ratio)}"
    found = [record(f"{environment}.traffic.ratio", ratio, "ratio")]
    for name, value in tps.items():
        found.append(record(f"{environment}.training.{name}.tps", value, "tokens/s", spread))
        found += [
            record(f"{environment}.training.{name}.ratio_to_{other}", value / its, "ratio", spread)
            for other, its in tps.items()
            if other != name
        ]
    return found


def test_the_winner_at_each_ratio_is_named_with_its_lead_over_the_next() -> None:
    fast = measured({"tp8_pp2": 100.0, "ep16": 300.0, "tp2_ep8": 240.0}, 0.3)
    slow = measured({"tp8_pp2": 40.0, "ep16": 90.0, "tp2_ep8": 135.0}, 2.0)
    assert rows_of([*slow, *fast]) == [
        ("0.30", "EP16 overlapped", "300 (297\u2013303)", "TP2/EP8", "1.25 (1.24\u20131.26)"),
        ("2.00", "TP2/EP8", "135 (134\u2013136)", "EP16 overlapped", "1.50 (1.49\u20131.52)"),
    ]


def test_a_ratio_that_was_recorded_the_other_way_round_alone_serves_as_well() -> None:
    both = measured({"tp8_pp2": 100.0, "ep16": 300.0}, 0.3)
    one_way = [each for each in both if not each.name.endswith("ratio_to_ep16")]
    neither = [each for each in both if "ratio_to" not in each.name]
    assert len(neither) < len(one_way) < len(both)
    assert rows_of(one_way) == rows_of(both) and rows_of(one_way)[0][-1].startswith("3.00 ")
    assert rows_of(neither)[0][-1] == "\u2013"


def test_two_are_named_where_the_bar_of_the_lead_holds_one() -> None:
    both = {"ep16": 300.0, "tp2_ep8": 298.0}
    assert rows_of(measured(both, 0.3, spread=0.01))[0][1] == "EP16 overlapped or TP2/EP8"
    assert rows_of(measured(both, 0.3, spread=0.001))[0][1] == "EP16 overlapped", "the control: the bar is above 1"
    assert [row[1] for row in rows_of(list(layout_records(BY_TRAFFIC)))] == [
        "EP16 overlapped or EP8 overlapped",
        "PP2/EP8",
    ]


def test_one_layout_alone_or_links_of_no_known_ratio_make_no_section() -> None:
    assert section_of(measured({"ep16": 300.0}, 0.3)) is None
    without_ratio = [each for each in measured({"ep16": 300.0, "tp2_ep8": 298.0}, 0.3) if ".traffic." not in each.name]
    assert section_of(without_ratio) is None


def test_every_line_of_the_picture_has_a_colour_and_marker_of_its_own() -> None:
    styles = styles_of(["ep4", "ep16", "pp4_ep4", "pp2_ep8", "ep8", "tp8_pp2", "tp2_ep8", "tp2_pp2_ep4"])
    assert len(set(styles.values())) == len({color for color, _ in styles.values()}) == 8
