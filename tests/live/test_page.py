"""The page in a real browser: what it shows, at a phone's and a desktop's width, in light and in dark."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.browser import BrowserPage, found_browser, open_browser
from tests.live.sample_runs import report, write_run
from tests.live.test_server import serving

PROGRAM = found_browser()
READY = "document.querySelector('#state') && document.querySelector('#state').textContent !== 'connecting'"
KEPT = os.environ.get("WATCH_SCREENSHOTS", "")  # a folder for people who want to look

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine: the page is not looked at")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserPage]:
    assert PROGRAM is not None
    with open_browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def visit(page: BrowserPage, url: str, width: int = 1280, scheme: str = "light") -> str:
    """The text of the page when it has its first figures."""
    page.events.clear()
    page.show(width, 900, scheme)
    page.send("Page.navigate", url=url)
    page.wait_for(f"location.href === {url!r} && document.readyState === 'complete' && {READY}")
    text: str = page.value("document.body.innerText")
    return text.replace("\u00a0", " ")


def test_an_empty_folder_says_what_it_waits_for_and_then_shows_the_first_report(
    page: BrowserPage, tmp_path: Path
) -> None:
    with serving(tmp_path) as server:
        text = visit(page, server.url)
        assert "waiting" in text and "Nothing is written yet" in text and "--watch DIR" in text
        write_run(tmp_path, 0, ends=False)
        page.wait_for("document.body.innerText.includes('The run has started and has not reported yet')")
        write_run(tmp_path, 1, run="20261128-120100-0c0c", ends=False)
        page.wait_for("document.querySelector('#tiles').innerText.includes('2.5000')")
        assert page.problems() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_there_with_its_unit_and_nothing_is_wider_than_the_screen(
    page: BrowserPage, tmp_path: Path, width: int, scheme: str
) -> None:
    write_run(tmp_path, 3)
    with serving(tmp_path) as server:
        text = visit(page, server.url, width, scheme)
        for words in (
            "ended", "2.4800", "1,002 tokens/s", "500 ms per step", "92.5 %", "blocking control 0.5 %; step 10",
            "12.0 ms in experts, 1.20 × mean; rank 1 on there, step 10", "1 of 8", "0.00 %",
            "expert 0, 20.0 rows per pass, 50.00 % of the layer, 2.00 × its mean. 1 without a row.",
            "rank 0 (here): 46 rows per pass, 1.14 × the mean", "No replica is in use",
        ):  # fmt: skip
            assert words in text, words
        assert page.value("document.documentElement.scrollWidth") == width
        assert page.value("document.querySelectorAll('svg').length") == 6
        ground = page.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(17, 20, 24)") == (scheme == "dark")
        assert page.problems() == []
        if KEPT:
            page.show(width, page.value("document.documentElement.scrollHeight"), scheme)
            page.screenshot(Path(KEPT) / f"{width}-{scheme}.png")


def test_the_heat_map_is_drawn_by_report_and_over_time(page: BrowserPage, tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    pixel = "Array.from(document.querySelector('#heat').getContext('2d').getImageData({x}, 5, 1, 1).data).join()"
    with serving(tmp_path) as server:
        visit(page, server.url)
        hot, even = (page.value(pixel.format(x=x)) for x in (150, 1200))
        assert hot != even, "an expert of twice the mean has another colour than one of 1.5 times"
        page.value(
            "(() => { const t = document.querySelector('#time'); t.value = 0; t.dispatchEvent(new Event('input')) })()"
        )
        page.wait_for("document.querySelector('#step').textContent === 'step 10'")
        page.value("document.querySelector('#byTime').click()")
        page.wait_for("document.querySelector('#cell').textContent.includes('expert 0 at step\u00a010')")
        assert "50.00\u00a0% of the layer" in page.value("document.querySelector('#cell').textContent")
        assert page.problems() == []


def test_replicas_and_numbers_that_are_not_finite_are_shown(page: BrowserPage, tmp_path: Path) -> None:
    log = write_run(tmp_path, 1, ends=False)
    odd = report(1, loss=math.nan, hidden_percent=None, control_percent=None, expert_ms_R=())
    with_replica = dataclasses.replace(odd.layers[0], guests_RS=((-1,), (0,)))
    of_two_groups = dataclasses.replace(odd.layers[1], guests_RS=((3,), (-1,), (3,), (-1,)))
    log.write(dataclasses.replace(odd, layers=(with_replica, of_two_groups)))
    with serving(tmp_path) as server:
        text = visit(page, server.url)
        words = (
            "NaN",
            "not measured",
            "expert 0 (rank 0) also on rank 1",
            "expert 3 also on rank 0, 2",
            "in 2 of 2 layers",
            "times need meter_every",
        )
        assert [each for each in words if each not in text] == []
        assert "1 report has no finite number here" in text and page.problems() == []


def test_a_server_that_stops_is_told(page: BrowserPage, tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    with serving(tmp_path) as server:
        visit(page, server.url)
    page.wait_for("document.querySelector('#note').textContent.startsWith('The server does not answer')")
    assert page.value("document.querySelector('#state').textContent") == "not connected"
