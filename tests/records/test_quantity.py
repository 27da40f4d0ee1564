"""Quantities: numbers as people read them, units that convert or are refused, and tables in three writings."""

from __future__ import annotations

import pytest
from rich.console import Console

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import NONE, Quantity, Row, counted, number, size, to_json
from ds_moe_ep.records.render import print_lines, print_tables, to_html, to_markdown
from ds_moe_ep.records.table import quantity_table


@pytest.mark.parametrize(
    ("value", "plain", "rounded"),
    [
        (0.0, "0", "0"),
        (450_120, "450,120", "450,000"),
        (999.4, "999", "999"),
        (999.6, "1,000", "1,000"),
        (99.96, "100", "100"),
        (45.25, "45.2", "45.2"),
        (-9.996, "-10.0", "-10.0"),
        (0.0123, "0.0123", "0.0123"),
        (0.0009, "9.00e-04", "9.00e-04"),
    ],
)
def test_numbers_keep_three_digits_that_count(value: float, plain: str, rounded: str) -> None:
    assert (number(value), number(value, digits=3)) == (plain, rounded)


def test_decimals_and_bytes() -> None:
    assert (number(1234.56, 1), number(-0.04, 1)) == ("1,234.6", "0.0")
    assert [size(value) for value in (12, 1_500, 2.5e6, 6.4512e12)] == ["12 B", "1.50 kB", "2.50 MB", "6,451.20 GB"]
    assert [counted(n, "copy", "copies") for n in (0, 1, 1024)] == ["0 copies", "1 copy", "1,024 copies"]
    assert counted(2, "rank") == "2 ranks"


def test_a_quantity_converts_within_its_kind_alone() -> None:
    step = Quantity.of(2500.0, 3000.0, 2000.0, unit="us", name="step", title="time per step")
    assert step.into("ms").bar == [2.5, 2.0, 3.0] and step.into("ms").text() == "2.50 (2.00\u20133.00)"
    assert to_json([step, step.into("ms").named("turn")]) == {"step_us": step.bar, "turn_ms": [2.5, 2.0, 3.0]}
    assert Quantity.of(0.984, unit="ratio").percent() == "98.4 %"
    with pytest.raises(ConfigError, match=r"step\.unit='us': not a unit of size"):
        step.into("GB")


def test_a_row_says_its_numbers_by_the_keys_of_json() -> None:
    step, saved = Quantity.of(2.0, unit="ms", name="step"), Quantity.of(0.5, 0.4, unit="ratio", name="saved")
    row = Row({"resource": "links"}, (step, saved))
    assert (row.title, row["step_ms"], row["saved_ratio"]) == ("links", step, saved)
    assert row.to_json("step_ms") == {"resource": "links", "step_ms": 2.0, "saved_ratio": [0.5, 0.4, 0.5]}


def test_a_table_says_the_same_in_three_writings() -> None:
    ours = [Quantity.of(321_234.0, 261_000.0, 378_000.0, unit="tokens/s", name="tps", title="tokens | second")]
    theirs = [*ours, Quantity.of(1.0, unit="ms", name="step", title="<step>")]
    table = quantity_table("A step", {"ours": ours, "theirs": theirs}, digits=3)
    bar = "321,000 (261,000\u2013378,000)"
    assert table.rows == (("tokens | second", "tokens/s", bar, bar), ("<step>", "ms", NONE, "1.00"))
    assert f"| tokens \\| second | tokens/s | {bar} | {bar} |" in to_markdown(table)
    page = to_html(table).replace('<span class="range">', "").replace("</span>", "")
    assert '<td class="text">&lt;step&gt;</td>' in page and f'<td class="number">{bar}</td>' in page
    console = Console(width=100, record=True, quiet=True)
    console.quiet = False
    with console.capture() as printed:
        print_tables([table], console)
    assert "tokens | second" in printed.get() and printed.get().count(bar) == 2


def test_numbers_have_the_digits_that_a_bar_leaves_them() -> None:
    assert [number(value, digits=3) for value in (0, 412_345, 1000.4, 999.4, 45.32, 1.2345, 0.01234, -29.25)] == [
        "0", "412,000", "1,000", "999", "45.3", "1.23", "0.0123", "-29.2",
    ]  # fmt: skip
    assert Quantity.of(-1e-9, 0.0).text(1) == "0.0"  # rounding leaves no sign


def test_a_named_line_that_is_too_long_goes_on_below_its_text() -> None:
    console = Console(width=24)
    with console.capture() as printed:
        print_lines({"faster": "1.34 times with recompute=false", "ranks": "16"}, console)
    assert printed.get().splitlines() == ["faster  1.34 times with", "        recompute=false", "ranks   16"]
