"""Files of spans: written, read back equal, and refused where a line cannot be a span."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.schedule.spans import Span, Tags, read_spans, write_spans

SPANS = [
    Span("dispatch 0", 3, "dispatch", 0.0, 9.5, Tags("ep16/layers.0.feed_forward", "forward", "node +1 (1/2)")),
    Span("größer", 0, "compute", 1.25, 1.25),
]
GOOD = '{"name": "d", "rank": 0, "lane": "dispatch", "start_us": 0.0, "stop_us": 1.0, "tags": {"peers": "near"}}'


def test_spans_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "x.spans.jsonl"
    assert write_spans(path, SPANS) == 2
    assert list(read_spans(path)) == SPANS
    assert [p.name for p in tmp_path.iterdir()] == ["x.spans.jsonl"]


def test_empty_lines_are_no_spans(tmp_path: Path) -> None:
    path = tmp_path / "x.spans.jsonl"
    path.write_text(f"\n{GOOD}\n\n", encoding="utf-8")
    assert list(read_spans(path)) == [Span("d", 0, "dispatch", 0.0, 1.0, Tags(peers="near"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "not a span"),
        ("[]", "not a span"),
        ("{}", "not a span"),
        (GOOD.replace('"peers"', '"pears"'), "not a span"),
        (GOOD.replace('"rank": 0', '"rank": "0"'), "an integer rank"),
        (GOOD.replace('"near"', "7"), "texts for names"),
        (GOOD.replace("1.0", '"1"'), "finite times"),
        (GOOD.replace("1.0", "NaN"), "finite times"),
        (GOOD.replace("1.0", "-1.0"), "cannot stop before it starts"),
    ],
)
def test_a_line_that_cannot_be_a_span_is_an_error_that_names_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "x.spans.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"x\.spans\.jsonl:2=.*{message}.*write the file with timeline"):
        list(read_spans(path))
