"""The page in examples/report is what `report` draws from the Records beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ds_moe_ep.cli.main import main
from tests.policy.sources import ROOT
from tests.soak.picture import dark_path, in_the_dark

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
    simulated = [line for line in lines if line["notes"].startswith("simulated, not measured")]
    assert simulated and all(line["name"].startswith("layouts.simulated_h100_4x4.") for line in simulated)
    measured = [line for line in lines if line not in simulated]
    assert measured and all(line["notes"].endswith(ORIGINS) for line in measured)


def test_the_soaks_picture_has_its_dark_variant() -> None:
    path = ROOT / "examples" / "soak" / "soak.png"
    light, dark = imread(path), imread(dark_path(path))
    made = in_the_dark(light)
    assert float(np.abs(made - dark).max()) < 2 / 255
    assert float(np.median(light[..., :3])) == 1 and float(np.median(dark[..., :3])) < 0.15, "the control: the ground"
    (blue,) = {tuple(np.round(255 * pixel)) for pixel in light[light[..., 2] - light[..., 0] > 0.69][:1, :3]}
    assert float(np.abs(255 * dark[..., :3] - blue).max(-1).min()) < 2, "curves keep their colours"
