"""Every number of the pages has a Record, a command or a derivation, and README's results are those of results.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from tests import pages
from tests.policy.links import anchors
from tests.policy.numbers import (
    index_of,
    measured_outside_of_the_index,
    numbers_without_source,
    parts,
    tables_without_source,
)
from tests.policy.sources import ROOT

RESULTS = (pages.DOCS / "results.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "README.md"
OTHERS = {"api.md", "knobs.md", "limits.md", "results.md"}  # generated, refusals, and the results themselves
SETTINGS: Mapping[str, Mapping[str, str]] = {  # numbers that nobody measured: page, beginning of the line, reason
    "baseline.md": {
        "- more micro-batches": "the bubble of 1F1B",
        "- all-reduces in two levels": "bytes of a ring",
    },
    "contributing.md": {"- The suite has 10 minutes": "a limit", "  0.2 s an engine": "a rule of thumb for a new test"},
    "examples": {
        "with the command that continues.": "a setting",
        "| `deepspeed` (its `launch.py`), torchrun |": "the launchers' limit",
        "  and `deepspeed` with it.": "ssh's settings",
    },
    "measuring.md": {
        "| `rank_load/p50_max_over_mean`": "a definition",
        "measured, the device idle at both ends": "the method",
        "(4 times the mean), W2 one hot rank": "a workload",
    },
    "overlap.md": {"runs the same pieces at depth 0": "what a control is"},
    "reference-job.md": {"| cluster |": "as stated", "| stated results |": "as stated"},
    "reliability.md": {
        "- **A time limit per peer**": "a setting",
        "  and a retry cannot read rows": "a limit",
        "  destructor blocks": "DeepSpeed's limit",
        "  gone or silent ends 3 s": "a limit",
        "- **A line about slow steps.**": "a rule",
        "  at each doubling:": "a message",
        "The launcher waits 30 s": "DeepSpeed's limit",
        "- `timeout_s` (600 s)": "a setting",
    },
    "replicas.md": {
        "   foretold (the fullest rank": "a rule",
        "| another placement": "a rule",
        "| copies move": "a rule",
        "| loads have changed": "a rule",
    },
    "troubleshooting.md": {
        "| `... did not answer": "a message",
        "| `step 412 has": "a message",
        "| 0 % hidden": "a symptom",
    },
}


PAGES = {path.name: path for path in pages.PAGES if path.name not in OTHERS} | {"examples": EXAMPLES}


@pytest.mark.parametrize("name", PAGES)
def test_a_measured_number_names_its_command_its_test_or_a_table_of_the_results(name: str) -> None:
    text, settings = PAGES[name].read_text(encoding="utf-8"), SETTINGS.get(name, {})
    assert numbers_without_source(text, settings) == []
    lines = text.splitlines()
    assert [known for known in settings if not any(line.startswith(known) for line in lines)] == [], "it is gone"


def test_every_table_of_the_results_has_its_command_its_commit_and_its_records() -> None:
    assert tables_without_source(RESULTS) == []
    assert measured_outside_of_the_index(RESULTS) == []
    index = index_of(RESULTS)
    assert len(index) >= 15 and index.keys() <= anchors(pages.DOCS / "results.md")


TABLE = "| a | b |\n| --- | --- |\n| 5 ms | 1 |\n"
ROW = "| [one](#one) | measured | `bench.one` | 1234abc | made again by its command |\n"


@pytest.mark.parametrize(
    ("page", "found"),
    [
        (f"{ROW}\n## One\n\nBy `python -m one`:\n\n{TABLE}", []),
        (f"{ROW}\n## One\n\nBy `python -m one`:\n\n### More\n\nThe same, at 1234abd:\n\n{TABLE}", ["More"]),
        (f"{ROW}\n## One\n\nText.\n\n### More\n\nBy `python -m one`:\n\n{TABLE}", ["More"]),
        (f"{ROW}\n## One\n\nText.\n\n### More\n\nBy `python -m one`, at 1234abd:\n\n{TABLE}", []),
        (f"## One\n\nBy `python -m one` at 1234abc:\n\n{TABLE}", ["One"]),
        (f"{ROW.replace('1234abc', 'lately')}\n## One\n\nBy `python -m one`:\n\n{TABLE}", ["One"]),
        (f"{ROW}\n## One\n\nIt was so:\n\n{TABLE}", ["One"]),
        ("## One\n\n```\n| no | table |\n| --- | --- |\n```\n", []),
    ],
)
def test_a_table_without_a_command_a_commit_or_records_is_found(page: str, found: list[str]) -> None:
    assert tables_without_source(page) == found


def test_a_measured_number_of_a_section_without_a_run_is_found() -> None:
    assert measured_outside_of_the_index(f"{ROW}\n## One\n\nIt took 5 ms.\n\n### More\n\nAnd 6 ms.\n") == []
    assert measured_outside_of_the_index(f"{ROW}\n## Two\n\nIt took 5 ms.\n\n### More\n\nNothing.\n") == ["Two"]


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("It took 5 ms.", True),
        ("It hides 98 % of it.", True),
        ("It is 3.1 (2.9-3.3) of the other.", True),
        ("There are 16 ranks of 4 nodes.", False),
        ("It took 5 ms (`python -m ds_moe_ep demo`).", False),
        ("It took 5 ms ([measured](results.md#one-layer)).", False),
        ("It took 5 ms, which `test_it.py` holds.", False),
        ("It took 5 ms.\n\nAnd that is by `python -m ds_moe_ep demo`.", True),
        ("By `python -m ds_moe_ep demo`:\n\nIt took 5 ms.", False),
        ("```\nIt took 5 ms.\n```\n", False),
    ],
)
def test_a_number_without_a_source_is_found(text: str, is_found: bool) -> None:
    assert bool(numbers_without_source(f"# Title\n{text}", {})) == is_found
    assert numbers_without_source(f"# Title\n{text}", {"It": "a setting"}) == []


def results_of_readme(readme: str) -> Iterator[tuple[str, list[str]]]:
    """(system, each text with numbers) of README's table of results."""
    (part,) = (part for part in parts(readme) if part.title.startswith("Results"))
    for row in re.findall(r"^\| (.+) \|$", part.text, re.MULTILINE)[2:]:
        name, *cells = row.split(" | ")
        yield re.sub(r"\*\*| \(.*\)|,", "", name), [cell for cell in cells if re.search(r"\d", cell)]


def not_in_results(readme: str, results: str) -> list[tuple[str, str]]:
    """README's results that the results' page does not have in a row of the same system, or of a share of it."""
    (part,) = (part for part in parts(results) if part.title == "Whole systems")
    rows = {row.split(" | ")[0].replace("*", ""): row for row in re.findall(r"^\| (.+) \|$", part.text, re.MULTILINE)}
    found = []
    for system, cells in results_of_readme(readme):
        own = " | ".join(row for name, row in rows.items() if name == system)
        share = " | ".join(row for name, row in rows.items() if name.startswith("overlapped: hidden"))
        for cell in cells:
            text, where = (cell.removesuffix(" %"), share) if cell.endswith("%") else (cell, own)
            if cell not in ("0 %", "1") and not re.search(rf"(?:\| |, ){re.escape(text)}(?![\d.]|,\d)", where):
                found.append((system, cell))
    return found


def test_the_results_of_readme_are_those_of_the_results_page() -> None:
    assert len([*results_of_readme(README)]) == 5
    assert not_in_results(README, RESULTS) == []


@pytest.mark.parametrize(("told", "changed"), [("3.49", "3.48"), ("6,638 (", "6,639 ("), ("92 %", "93 %")])
def test_a_number_of_readme_that_was_changed_is_found(told: str, changed: str) -> None:
    before, _, after = README.partition("## Results")
    spoilt = before + "## Results" + after.replace(f"| {told}", f"| {changed}", 1)
    assert spoilt != README
    assert [system for system, _ in not_in_results(spoilt, RESULTS)] == ["EP16 overlapped"]
