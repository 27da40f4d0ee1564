"""Files of Records -> report.html, report.md and figures/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ds_moe_ep.config.command_line import writable_folder
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import replace_file
from ds_moe_ep.report.findings import Findings, read_findings, undrawn
from ds_moe_ep.report.html import to_html
from ds_moe_ep.report.markdown import to_markdown
from ds_moe_ep.report.page import Page, PageSection, notes_once
from ds_moe_ep.report.sections.headline import headline
from ds_moe_ep.report.sections.layouts import layouts
from ds_moe_ep.report.sections.overlap import overlap
from ds_moe_ep.report.sections.scaling import scaling
from ds_moe_ep.report.sections.soak import soak
from ds_moe_ep.report.sections.sources import head, sources
from ds_moe_ep.report.sections.stated import stated
from ds_moe_ep.report.sections.sweep import simulated_scaling
from ds_moe_ep.report.sections.systems import latency, memory, throughput
from ds_moe_ep.report.sections.timeline import timeline
from ds_moe_ep.report.sections.training import load, loss

TITLE = "ds_moe_ep: what was measured"
SECTIONS: dict[str, Callable[[Findings], PageSection | None]] = {  # by what a reader misses where there is none
    "throughput": throughput,
    "layouts by link": layouts,
    "where the time goes": latency,
    "timeline of a layer": timeline,
    "load of the experts": load,
    "memory": memory,
    "schedules over links": overlap,
    "scaling": scaling,
    "simulated scaling": simulated_scaling,
    "loss": loss,
    "soak": soak,
    "the specification's figures": stated,
}


def write_report(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The files written under `folder`: report.html (which stands alone), report.md, and its figures.

    Raises ConfigError for Records or spans that cannot be read, and where there are none that it draws.
    """
    findings = read_findings(paths)
    page = make_page(findings, try_folder=lambda: writable_folder(folder, "out"))
    contents: dict[Path, bytes] = {
        folder / "report.html": to_html(page).encode(),
        folder / "report.md": to_markdown(page).encode(),
    }
    for picture in page.pictures:
        contents[folder / "figures" / f"{picture.key}.png"] = picture.drawing.png
        contents[folder / "figures" / f"{picture.key}.svg"] = picture.drawing.svg
        contents[folder / "figures" / f"{picture.key}_narrow.svg"] = picture.drawing.narrow()
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            replace_file(path, content)
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be written ({error}); name a folder of your own") from error
    return list(contents)


def make_page(findings: Findings, try_folder: Callable[[], object] = lambda: None) -> Page:
    """The page of everything that the findings hold; `try_folder` is called before the drawing, which takes seconds.

    Raises ConfigError where nothing would be drawn.
    """
    if not findings.by_name:
        raise ConfigError(undrawn(findings))
    try_folder()
    made = {name: make(findings) for name, make in SECTIONS.items()}
    if not any(made.values()):
        raise ConfigError(undrawn(findings))
    absent = [name for name, section in made.items() if section is None]
    present = [section for section in made.values() if section is not None]
    sections = notes_once([head(findings, absent), *present])
    return Page(TITLE, headline(findings), (*sections, sources(findings)))
