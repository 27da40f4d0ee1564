"""The page's first sentences, its notes, and laws that do not fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ds_moe_ep.records.record import Record
from ds_moe_ep.report.findings import Findings, Source
from ds_moe_ep.report.html import to_html
from ds_moe_ep.report.markdown import to_markdown
from ds_moe_ep.report.page import PageSection, Picture, notes_once
from ds_moe_ep.report.sections.headline import headline
from ds_moe_ep.report.sections.scaling import scaling
from ds_moe_ep.report.sections.systems import throughput
from ds_moe_ep.report.write import make_page
from tests.report.sample_records import (
    TPS,
    every_record,
    loss_records,
    overlap_records,
    record,
    scaling_records,
    soak_records,
    sweep_records,
    system_records,
)


@pytest.fixture(autouse=True)
def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are painted and not rendered, which takes seconds; these tests are about words."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def findings_of(records: Iterable[Record]) -> Findings:
    return Findings((Source(Path("some.jsonl"), tuple(records)),))


def misfit(what: str = "busy", r2: float = -1663.2) -> Record:
    return record(f"scaling.constant_rank.fit.{what}.r2", r2, "ratio", emulated=True)


def test_the_headline_of_whole_systems_is_their_gain_what_is_hidden_and_the_laws() -> None:
    gain, hidden, laws = headline(findings_of([*every_record(), misfit()]))
    over = [f"{TPS['ep16'] / TPS[other]:.2f} \u00d7" for other in ("tp8_pp2", "native_ep16", "ep16_serial")]
    assert gain.startswith(
        f"EP16 overlapped trains {over[0]} as fast as TP8/PP2 and {over[1]} as fast as DeepSpeed MoE"
    )
    assert gain.endswith("(links as in the specification's cluster; emulated).")
    assert "hides 93.0 % of the experts' traffic" in hidden and f"{over[2]} as fast as EP16 serial" in hidden
    assert "TPS ~ EP (R\u00b2 0.984)" in laws and "utilization ~ 1 - 1/EP does not fit" in laws


def test_what_was_measured_without_emulation_is_not_called_emulated() -> None:
    gain, _ = headline(findings_of(system_records(("loopback",))))
    assert gain.endswith("(loopback, real compute).")


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (list(loss_records(steps=3)), "The losses of 8 systems lie within"),
        (list(sweep_records()), "Throughput goes from 20,000 tokens/s at EP=1 to 20,480,000 tokens/s at EP=1024"),
        (list(soak_records()), "6 of the soak's 7 verdicts hold; all runs computed the same bits: not so."),
        (list(scaling_records()), "With constant tokens"),
        ([record("system.loopback.training.ep16.memory.weights", 1e6, "bytes")], ""),
    ],
    ids=["losses", "sweep", "soak", "laws", "none"],
)
def test_a_sentence_needs_its_own_records_alone(records: list[Record], told: str) -> None:
    sentences = headline(findings_of(records))
    assert len(sentences) == (1 if told else 0)
    assert all(sentence.startswith(told) for sentence in sentences)


def test_a_schedule_is_told_with_its_worst_link_and_its_best() -> None:
    emulated, real = headline(findings_of(overlap_records()))
    assert emulated == (
        "One layer on emulated devices, with the schedule peers, is 1.28 to 1.29 \u00d7 as fast as serial over 2 links"
        ", and hides 95.0 % of its transfers."
    )
    assert real.startswith("One layer on real compute")


def test_a_page_begins_with_its_headline() -> None:
    page = make_page(findings_of(loss_records(steps=2)))
    (sentence,) = page.headline
    assert to_markdown(page).split("\n\n")[1] == sentence
    text = to_html(page)
    assert text.index(sentence) < text.index("<nav>") < text.index("<h2>")


def test_a_law_that_fits_worse_than_a_constant_does_not_fit_whatever_its_number() -> None:
    page = make_page(findings_of([*scaling_records(), misfit()]))
    text = to_markdown(page)
    assert "1663" not in text and "1,663" not in text
    assert "| utilization ~ 1 - 1/EP | 0.94 | does not fit | 0.984 |" in text
    assert "does not fit" in next(line for line in text.splitlines() if line.startswith("| R\u00b2 of utilization"))
    fitting = to_markdown(make_page(findings_of(scaling_records())))
    assert "does not fit" not in fitting


def with_notes(records: Iterable[Record]) -> list[Record]:
    notes = ("slowest rank, quartiles", "emulated device; slowest rank, quartiles", "one step")
    return [dataclasses.replace(r, notes=notes[place % 3]) for place, r in enumerate(records)]


def test_each_note_stands_on_the_page_once_and_what_rests_on_it_has_its_number() -> None:
    page = make_page(findings_of(with_notes([*system_records(("cluster",)), *scaling_records()])))
    text = to_markdown(page)
    notes = text.partition("## Notes\n\n")[2].partition("\n\n")[0].splitlines()
    assert [note.partition(". ")[0] for note in notes] == ["1", "2", "3"]
    for note in notes:
        assert text.count(note.partition(". ")[2]) == 1, note
    told = re.findall(r"^\*(?:Not emulated|Emulated).*\*$", text, re.MULTILINE)
    assert len(told) > 5 and all(re.search(r"Notes? \d", line) for line in told if "Notes" in line)
    assert "*Emulated. Notes 1, 2, 3.*" in told
    assert "<ol><li>" in to_html(page)


def test_numbers_of_notes_belong_to_the_tables_that_had_the_notes() -> None:
    first, second = (
        throughput(findings_of(with_notes(system_records(("cluster",))))),
        scaling(findings_of([misfit()])),
    )
    assert first is not None and second is None
    alone = record("scaling.constant_rank.ep4.tps", 3.0, "tokens/s", notes="another", emulated=True)
    other = scaling(findings_of([alone]))
    assert other is not None
    sections: tuple[PageSection, ...] = notes_once([first, other])
    picture = sections[1].blocks[0]
    assert isinstance(picture, Picture)
    assert picture.basis == ("Emulated. Note 4.",)
    assert sections[-1].title == "Notes"
