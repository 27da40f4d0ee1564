"""The page from Records: what is on it, what is absent, and that every number comes from a Record."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ds_moe_ep.records.names import SYSTEMS
from ds_moe_ep.records.quantity import NONE
from ds_moe_ep.records.record import Record, write_records
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings, Source, spans_path
from ds_moe_ep.report.page import EMULATED, REAL, Page, PageSection
from ds_moe_ep.report.plots.style import (
    GROUND,
    IN_THE_DARK,
    PALE,
    PART_COLORS,
    PHONE_IN,
    SYSTEM_COLORS,
    WIDTH_IN,
)
from ds_moe_ep.report.plots.timeline import ROWS
from ds_moe_ep.report.sections.soak import soak
from ds_moe_ep.report.sections.stated import ANSWERS, stated
from ds_moe_ep.report.sections.systems import throughput
from ds_moe_ep.report.write import make_page, write_report
from ds_moe_ep.schedule.spans import write_spans
from ds_moe_ep.specification.claims import RATIO, stated_and_derived
from tests.report.sample_records import (
    load_records,
    loss_records,
    overlap_records,
    record,
    scaling_records,
    soak_records,
    spans,
    sweep_records,
    system_records,
)

FIGURES = (
    "throughput",
    "layouts",
    "latency",
    "timeline",
    "load_loopback",
    "load_of_systems_loopback",
    "memory",
    "overlap",
    "scaling",
    "sweep_simulated_some",
    "sweep_copies_simulated_some",
    "loss",
    "soak",
)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def small_records() -> list[Record]:
    """All kinds, of one real and one emulated environment."""
    short = {"steps": 4, "layers": 1}
    records = [*system_records(("loopback", "cluster")), *loss_records(steps=4), *load_records(**short)]
    return [*records, *scaling_records(("constant_rank",)), *sweep_records(), *soak_records(), *overlap_records()]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written report of all sections."""
    folder = tmp_path_factory.mktemp("report")
    write_records(folder / "systems.jsonl", small_records())
    write_spans(spans_path(folder / "systems.jsonl"), spans())
    write_report([folder / "systems.jsonl"], folder / "out")
    return folder / "out"


def findings_of(records: Sequence[Record]) -> Findings:
    return Findings((Source(Path("some.jsonl"), tuple(records)),))


def titles_of(page: Page) -> list[str]:
    return [section.title for section in page.sections]


def tables_of(section: PageSection | None) -> list[Table]:
    assert section is not None
    return [block for block in section.blocks if isinstance(block, Table)]


def test_all_sections_and_figures_are_written_when_all_records_exist(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    assert titles == [
        "What was measured", "Throughput", "Layouts by link", "Where the time goes", "What hides what",
        "Load of the experts", "Memory",
        "Schedules over links", "Scaling", "Scaling, simulated", "Loss", "Soak", "The specification's figures",
        "Records and commands",
    ]  # fmt: skip
    assert "Absent" not in markdown
    written = {path.name for path in (report / "figures").iterdir()}
    assert written == {f"{name}{end}" for name in FIGURES for end in (".png", ".svg", "_narrow.svg")}


def test_every_link_of_the_markdown_page_leads_somewhere(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    targets = [link or source for link, source in re.findall(r'\]\(([^)]+)\)|src(?:set)?="([^"]+)"', text)]
    assert len(targets) == 3 * len(FIGURES)
    assert [target for target in targets if not (report / target).is_file()] == []


class Resources(HTMLParser):
    """Collects what a page fetches or links, and checks that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.open: list[str] = []
        self.wide: list[bool] = []  # of each open tag: whether it scrolls by itself
        self.loose: list[str] = []  # what may be wider than the page and does not

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.anchors |= {value or "" for name, value in attrs if name == "id"}
        if tag in ("img", "table") and not any(self.wide):
            self.loose.append(tag)
        if tag not in ("meta", "br", "img", "link", "source"):
            self.open.append(tag)
            self.wide.append(("class", "wide") in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.wide.pop()


def test_the_html_page_needs_no_other_file_and_is_well_formed(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Resources()
    page.feed(text)
    assert page.open == []
    assert page.loose == [], "on a phone the page itself would scroll sideways"
    pictures = [target for target in page.targets if not target.startswith("#")]
    assert len(pictures) == 2 * len(FIGURES), "each for a phone too"
    assert all(target.startswith("data:image/svg+xml;base64,") for target in pictures)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= page.anchors
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"@import|url\(", text)


def test_a_phone_gets_each_picture_with_its_panels_in_one_column(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    found = re.findall(
        r'<source media="\(max-width: 44rem\)" srcset="data:[^,]*,([^"]+)"><img [^>]*src="data:[^,]*,', text
    )
    assert len(found) == len(FIGURES)
    for narrow, name in zip(map(base64.b64decode, found), FIGURES, strict=True):
        wide = (report / "figures" / f"{name}.svg").read_bytes()
        widths, heights = zip(
            *(re.findall(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0] for svg in (narrow, wide)), strict=True
        )
        assert [float(width) / 72 for width in widths] == pytest.approx([PHONE_IN, WIDTH_IN], rel=0.01)
        assert float(heights[0]) >= float(heights[1]), name
        assert narrow == (report / "figures" / f"{name}_narrow.svg").read_bytes(), "which report.md shows on a phone"
        assert f'srcset="figures/{name}_narrow.svg"' in (report / "report.md").read_text(encoding="utf-8")


def test_a_table_of_text_alone_has_its_heads_in_its_cells_for_pages_that_stack_them(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    (stated_table,) = re.findall(r'<table class="stacked">.*?</table>', text.partition('id="the-specification-s')[2])
    first = stated_table.partition("<tbody>")[2].partition("</tr>")[0]
    heads = re.findall(r'<td class="text" data-head="(.*?)">', first)
    assert heads == ["figure", "stated", "derived", "measured here", "simulated", "remarks"]
    numbers = text.partition('id="throughput"')[2].partition("</section>")[0]
    assert "data-head" not in numbers and "stacked" not in numbers


def neutrals(svg: str) -> set[str]:
    """The greys of a picture, from black to white."""
    found = re.findall(r"(?:fill|stroke): #([0-9a-f]{6})", svg)
    return {f"#{color}" for color in found if color[:2] == color[2:4] == color[4:]}


def test_in_the_dark_all_that_is_written_on_a_pictures_ground_changes_its_colour(report: Path) -> None:
    of_bars = {*SYSTEM_COLORS.values(), *PART_COLORS.values(), ROWS["weights"][1], PALE, "#000000"}  # the last: on bars
    for path in sorted((report / "figures").glob("*.svg")):
        style, _, body = path.read_text(encoding="utf-8").partition("</style>")
        assert neutrals(body) - of_bars <= IN_THE_DARK.keys(), path.name
        rules = style.partition("@media (prefers-color-scheme: dark)")[2]
        assert all(
            f'[style*="fill: {color}"]{{fill:{dark} !important}}' in rules for color, dark in IN_THE_DARK.items()
        )
        assert f'style="fill: {GROUND}"' in body, "the ground itself"
    assert "color-scheme: light dark" in (report / "report.html").read_text(encoding="utf-8")


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    write_records(path, [*load_records(("ep16",), steps=2, layers=1), *scaling_records(("constant_rank",))])
    first, second = ({p.name: p.read_bytes() for p in write_report([path], tmp_path / out)} for out in ("a", "b"))
    assert first == second
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("records", "present"),
    [
        ([r for r in system_records(("loopback",)) if r.name.endswith(".tps")], ["Throughput"]),
        ([r for r in system_records(("cluster",)) if ".breakdown." in r.name], ["Where the time goes"]),
        ([r for r in system_records(("cluster",)) if ".memory." in r.name], ["Memory"]),
        (list(loss_records(steps=2)), ["Loss"]),
        (list(load_records(("ep16",), steps=2, layers=1)), ["Load of the experts"]),
        (list(scaling_records(("constant_total",))), ["Scaling"]),
        (list(sweep_records()), ["Scaling, simulated"]),
        (list(soak_records()), ["Soak"]),
    ],
    ids=["throughput", "latency", "memory", "loss", "load", "scaling", "simulated scaling", "soak"],
)
def test_a_section_is_there_with_its_records_alone(records: list[Record], present: list[str]) -> None:
    page = make_page(findings_of(records))
    titles = [title for title in titles_of(page) if title != "The specification's figures"]
    assert titles == ["What was measured", *present, "Records and commands"]
    told = str(page.sections[0])
    assert "Absent for lack of Records: " in told
    assert "timeline of a layer" in told


def test_no_number_of_the_headline_tables_is_not_in_a_record() -> None:
    records = list(system_records(("cluster",)))
    scales = {"tokens/s": (1.0,), "us": (1.0,), "ms": (1.0,), "ratio": (1.0, 100.0)}
    known = [scale * value for r in records for scale in scales.get(r.unit, ()) for value in (r.value, *r.spread)]
    tables = tables_of(throughput(findings_of(records)))
    assert len(tables) == 2
    checked = 0
    for text in (cell for table in tables for row in table.rows for cell in row[1:]):
        for found in NUMBER.findall(text):
            digits = len(found.partition(".")[2])
            assert any(abs(float(found.replace(",", "")) - value) <= 0.500001 * 10**-digits for value in known), text
            checked += 1
    assert checked == 2 * 46  # of two modes


def test_the_gain_is_told_in_steps_and_over_deepspeeds_layers() -> None:
    names = {
        "ep16_serial.ratio_to_tp8_pp2": 2.1,
        "ep16.ratio_to_ep16_serial": 1.5,
        "ep16.ratio_to_tp8_pp2": 3.15,
        "ep16.ratio_to_native_ep16": 1.65,
    }
    records = [record(f"system.loopback.training.{name}", value, "ratio") for name, value in names.items()]
    told = str(throughput(findings_of(records)))
    steps = (
        "TP8/PP2 \u2192 EP16 serial: 2.10 \u00d7; EP16 serial \u2192 EP16 overlapped: 1.50 \u00d7; "
        "TP8/PP2 \u2192 EP16 overlapped: 3.15 \u00d7"
    )
    assert steps in told
    assert "EP16 overlapped over DeepSpeed MoE EP16: 1.65 \u00d7" in told
    assert "over DeepSpeed AutoEP" not in told


def test_emulated_is_said_beside_every_table_and_figure(report: Path) -> None:
    for part in (report / "report.md").read_text(encoding="utf-8").split("\n## ")[2:-1]:
        blocks = re.split(r"\n\n(?=\*\*|!\[|<picture>)", part)[1:]
        assert blocks or "specification" in part
        for block in blocks:
            assert "mulated" in block, block[:80]
    real = tables_of(throughput(findings_of(list(system_records(("loopback",))))))
    shaped = tables_of(throughput(findings_of(list(system_records(("cluster",))))))
    assert {table.basis for table in real} == {(REAL,)}
    assert {table.basis for table in shaped} == {(EMULATED,)}


def test_the_specifications_table_answers_what_was_measured_and_says_what_was_not() -> None:
    (table,) = tables_of(stated(findings_of([*system_records(("loopback",)), *scaling_records()])))
    rows = {row[0]: row for row in table.rows}
    assert rows[RATIO][1:4] == ("3.75", "450/120 = 3.75", "loopback: 3.07")
    assert rows["communication hidden"][1] == "80 %"
    assert rows["communication hidden"][3] == "loopback: 93.0 %"
    assert rows["one expert"][3] == "not measured"
    law = rows["R\u00b2 of TPS ~ EP"]
    assert (law[1], law[3]) == ("0.97", "constant tokens per rank, constant tokens in total: 0.984")


def test_the_soak_tells_its_weather_its_peak_and_every_verdict() -> None:
    section = soak(findings_of(list(soak_records())))
    (table,) = tables_of(section)
    assert "In 40 steps: 2 bursts." in str(section)
    assert [row[1] for row in table.rows] == ["yes", "yes", "yes", "yes", "yes", "no", "yes", NONE]
    assert table.rows[0] == ("resident memory is flat", "yes", "all about memory")
    assert "422 MB" in table.rows[-1][2]
    assert soak(findings_of([record("soak.run1.memory.step00010", 4e8, "bytes")])), "a run that was cut short"


def test_every_answer_belongs_to_a_figure_of_the_specification() -> None:
    assert set(ANSWERS) <= {figure.name for figure in stated_and_derived()}


def test_every_system_has_a_colour_of_its_own() -> None:
    assert set(SYSTEM_COLORS) == set(SYSTEMS)
    assert len(set(SYSTEM_COLORS.values())) == len(SYSTEMS)
