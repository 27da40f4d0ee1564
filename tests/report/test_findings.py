"""Reading Records and spans, asking for them by the parts of a name, units, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import cell, convert, number
from ds_moe_ep.records.record import Record, write_records
from ds_moe_ep.report.findings import Findings, Source, read_findings, spans_path
from ds_moe_ep.report.known_names import environment_order, is_known
from ds_moe_ep.report.plots.timeline import exposed, rows_of
from ds_moe_ep.schedule.spans import Span, Tags, accounts, write_spans
from tests.policy.sources import ROOT
from tests.report.sample_records import every_record, record, spans, system_records

LOSS = "system.loopback.training.ep16.loss.step1"


def test_every_sample_record_is_known_and_other_names_are_not() -> None:
    assert [r.name for r in every_record() if not is_known(r.name)] == []
    others = ("layer.k1_even.native.time", "system.moon.training.ep16.tps", "system.loopback.training.ep8.tps",
              "system.loopback.forward.ep16.loss.step1", "scaling.constant_rank.ep4.colour", "system")  # fmt: skip
    assert [name for name in others if is_known(name)] == []


def test_beds_modes_and_systems_come_in_the_order_of_the_page() -> None:
    records = list(system_records(("traffic130", "cluster", "traffic65", "loopback")))
    findings = Findings((Source(Path("x.jsonl"), tuple(reversed(records))),))
    assert findings.environments == ("loopback", "cluster", "traffic65", "traffic130")
    assert findings.places("tps")[:2] == [("loopback", "training"), ("loopback", "forward")]
    assert findings.systems("tps") == ("tp8_pp2", "ep16_serial", "ep16", "native_ep16", "autoep_ep16")
    assert findings.systems("hidden", environment="cluster") == ("ep16_serial", "ep16", "native_ep16", "autoep_ep16")
    assert environment_order("traffic65") < environment_order("traffic130")


def test_a_later_record_of_the_same_name_counts_and_the_replaced_one_is_told() -> None:
    old, new = record(LOSS, 3.0, "loss"), record(LOSS, 2.0, "loss")
    findings = Findings((Source(Path("a.jsonl"), (old,)), Source(Path("b.jsonl"), (new,))))
    assert findings.by_name[LOSS].value == 2.0
    assert findings.num_replaced == 1


def test_other_records_are_counted_and_never_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is nothing else to draw they are an error, which says what they are."""
    path, others = tmp_path / "x.jsonl", [record("layer.k1_even.native.time", 1.0, "ms"), record("probe.x", 0.9, "us")]
    write_records(path, [*others, record(LOSS, 3.0, "loss")])
    assert main(["report", str(path), "-o", str(tmp_path / "out")]) == 0
    assert "2 other records were not used." in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    write_records(path, [*others, record("overlap.cluster.hidden", 0.9, "ratio")])
    assert main(["report", str(path), "-o", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert "draws none of 1 layer.* (`bench layer`'s" in told and "1 probe.* (`bench probe`'s, for `calibrate`)" in told
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no Record in there; measure first"), ("{}\n", "x.jsonl:1.name: missing"), ("\nno\n", "x.jsonl:2='no")],
)
def test_broken_or_empty_records_are_errors_that_name_file_and_line(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    assert main(["report", str(path), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_file_of_spans_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_records(path, [record(LOSS, 3.0, "loss")])
    write_spans(spans_path(path), spans()[:2])
    with open(spans_path(path), "a", encoding="utf-8") as lines:
        lines.write("{}\n")
    with pytest.raises(ConfigError, match=r"x\.spans\.jsonl:3=.*not a span"):
        read_findings([path])


def test_spans_that_are_named_with_their_records_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_records(path, [record(LOSS, 3.0, "loss")])
    write_spans(spans_path(path), spans()[:2])
    (source,) = read_findings(sorted(tmp_path.glob("*.jsonl"))).sources
    assert (source.path, len(source.records), len(source.spans)) == (path, 1, 2)


def test_missing_files_files_of_spans_and_repeated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_findings([path])
    with pytest.raises(ConfigError, match="the spans are found by name"):
        read_findings([spans_path(path)])
    write_records(path, [record(LOSS, 3.0, "loss")])
    with pytest.raises(ConfigError, match="given twice"):
        read_findings([path, path])


@pytest.mark.parametrize(
    ("given", "unit", "expected"),
    [
        (record("a.b", 2.0, "s"), "ms", 2000.0),
        (record("a.b", 0.5, "ratio"), "percent", 50.0),
        (record("a.b", 50.0, "%"), "percent", 50.0),
        (record("a.b", 3e9, "bytes"), "GB", 3.0),
        (record("a.b", 3.0, "us/token"), "us", 3.0),
        (record("a.b", 3.0, "ratio"), "loss", 3.0),
    ],
)
def test_records_are_converted_between_units_of_one_kind(given: Record, unit: str, expected: float) -> None:
    assert convert(given, unit).value == pytest.approx(expected)


def test_a_unit_that_measures_something_else_is_an_error_that_names_the_record() -> None:
    with pytest.raises(ConfigError, match=r"a\.b\.unit='bytes': not a unit of time; write it in one of us, ms, s"):
        convert(record("a.b", 1.0, "bytes"), "ms")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (450_120.4, "450,120"), (999.7, "1,000"), (99.97, "100"), (45.26, "45.3"), (2.0, "2.00"),
     (0.9996, "1.00"), (0.65, "0.650"), (0.01234, "0.0123"), (0.00002, "2.00e-05"), (-3.14159, "-3.14")],
)  # fmt: skip
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_quartiles_stand_in_brackets_only_where_they_differ() -> None:
    assert cell(record("a.b", 10.0, "ms", 0.1), "ms", bar=True) == "10.0 (9.00\u201311.0)"
    assert cell(record("a.b", 10.0, "ms"), "ms", bar=True) == "10.0"
    assert cell(None, "ms") == "\u2013"


def test_the_shaded_ground_of_a_timeline_is_the_exposed_time_of_the_accounts() -> None:
    for system in ("ep16/", "ep16_serial/"):
        mine = [span for span in spans(ranks=(0,)) if span.tags.layer.startswith(system)]
        assert sum(stop - start for start, stop in exposed(mine)) == pytest.approx(accounts(mine)[Tags()].exposed_us)


@pytest.mark.parametrize(
    ("peers", "rows"),
    [("near (1/2)", "near"), ("own", "near"), ("node +2", "far"), ("all peers", "all"), ("all peers (1/4)", "all"),
     ("ranks +1 to +3", "far"), ("", "weights")],
)  # fmt: skip
def test_spans_are_coloured_by_whose_rows_they_work_on(peers: str, rows: str) -> None:
    assert rows_of(Span("compute 0", 0, "compute", 0, 1, Tags("ep16/0", "forward", peers))) == rows


def test_the_command_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    write_records(
        path, [record(f"system.cluster.training.{name}.tps", 10.0, "tokens/s") for name in ("ep16", "tp8_pp2")]
    )
    assert main(["report", str(path), "-o", str(out)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / name) for name in (
        "report.html", "report.md", "figures/throughput.png", "figures/throughput.svg",
        "figures/throughput_narrow.svg")]  # fmt: skip
    assert all(Path(name).is_file() for name in printed)


def test_help_of_the_command_loads_no_matplotlib_and_the_report_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        "from ds_moe_ep.cli.main import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: print('matplotlib' in sys.modules)\n"
        "import ds_moe_ep.report.write"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


def test_only_the_plots_know_matplotlib() -> None:
    files = list((ROOT / "ds_moe_ep" / "report").rglob("*.py"))
    code = {path: path.read_text(encoding="utf-8").partition('"""\n\n')[2] for path in files}
    knowing = {path.parent.name for path in files if "matplotlib" in code[path]}
    assert knowing == {"plots"}
