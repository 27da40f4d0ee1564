"""Wrong input of every command: refused before any work, exit code 2, with the nearest name; as JSON under --json."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.bench import testbed
from ds_moe_ep.bench.harness import benchmark as harness
from ds_moe_ep.bench.layer.command import LayerBenchmark
from ds_moe_ep.cli.main import main
from ds_moe_ep.cli.options import BENCHMARKS
from ds_moe_ep.config.command_line import Parser, writable_folder
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.records.record import write_records
from tests.policy.sources import ROOT
from tests.report.sample_records import record

EP16, CLUSTER = (str(ROOT / "ds_configs" / path) for path in ("ep16.json", "clusters/h100_4x4.json"))
PLAN = ["plan", "--config", EP16, "--cluster", CLUSTER]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["chek-config", EP16], "COMMAND=chek-config: did you mean 'check-config'?"),
        (["--verson"], "--verson: unknown option; did you mean '--version'?"),
        (["check-config", EP16, "--world_size", "16"], "--world_size: unknown option; did you mean '--world-size'?"),
        (["check-config", EP16, "--world", "16"], "--world: unknown option; did you mean '--world-size'?"),
        (["check-config", EP16, "--world-size"], "--world-size: expected one argument"),
        (["check-config", EP16, "--world-size=-4"], "--world-size=-4: give a whole number of 1 or more"),
        (["check-config", EP16, "--gpu-gb", "nan"], "--gpu-gb=nan: give a number that is more than 0"),
        (["check-config", EP16, "more"], "'more': one argument too many"),
        (["check-config", EP16, "-z"], "-z: unknown option"),
        (["plan", "--clster", CLUSTER], "--clster: unknown option; did you mean '--cluster'?"),
        ([*PLAN, "--micro-batch", "x"], "--micro-batch=x: give a number of sequences, or largest"),
        ([*PLAN, "--trace", "/dev/null"], "--trace=/dev/null: no ordinary file"),
        (["audit", "--markdwn"], "--markdwn: unknown option; did you mean '--markdown'?"),
        (["calibrate", "x", "--cluster", CLUSTER, "--precision", "fp8"], "--precision=fp8: did you mean 'fp32'?"),
        (["doctor", "--seconds", "1e9"], "--seconds=1e9: give a number that is more than 0 and at most 3600"),
        (["bench", "layr"], "BENCHMARK=layr: did you mean 'layer'?"),
        (["bench", "layer", "--side", "native"], "--side: unknown option; did you mean '--sides'?"),
        (["bench", "layer", "--sides", "nativ"], "--sides=nativ: did you mean 'native'?"),
        (["bench", "layer", "--cases", "k1_evn"], "--cases=k1_evn: did you mean 'k1_even'?"),
        (["bench", "layer", "--rounds", "0"], "--rounds=0: give a whole number of 1 or more"),
        (["bench", "layer", "--ranks", "3"], "bench.ranks=3 must divide"),
        (["bench", "layer", "--device", "cuda", "--ranks", "16"], "16 ranks need a GPU each"),
        (["bench", "overlap", "--ratios", "1", "-2"], "--ratios=-2: give a number that is more than 0"),
        (["bench", "overlap", "--links", "nanmbit"], "--links=nan: give a number that is more than 0"),
        (["bench", "overlap", "--warm-ups", "-1"], "--warm-ups=-1"),
        (["bench", "scaling", "--compute-s", "inf"], "--compute-s=inf"),
        (["bench", "soak"], "BENCHMARK=soak: known values: layer, overlap, probe, scaling, systems"),
        (["bench", "systems", "--systems", "ep17"], "--systems=ep17: did you mean 'ep16'?"),
        (["bench", "probe", "--ranks", "-1"], "--ranks=-1: give a whole number of 0 or more"),
    ],
)
def test_what_is_mistyped_or_out_of_range_is_refused_by_name(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "started_ranks", None)  # a rank that starts would be an error
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ConfigError: ") and told in err and err.count("\n") == 1


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_tries_its_file_before_it_starts(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, told in ((tmp_path, "a folder"), (tmp_path / "no" / "x.jsonl", "there is no folder")):
        assert main(["bench", benchmark, "--out", str(path)]) == 2
        assert f"--out={path}: {told}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["audit", "--out"], [*PLAN, "--out"], [*PLAN, "--trace"]])
def test_a_file_that_cannot_be_written_is_refused_and_no_device_is_replaced(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.stat("/dev/null")
    for path in ("/dev/null", "/proc/none.jsonl", str(tmp_path / ("x" * 300)), str(tmp_path)):
        assert main([*words, path]) == 2
        assert path in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null") == before


@pytest.mark.parametrize(
    "words",
    [
        ["check-config", "none.json", "--json"],
        ["check-config", "--json", "--nope"],
        ["plan", "--json", "--config", EP16],
        ["audit", "--json", "--cluster", "none.json"],
        ["audit", "--json", "--markdown"],
        ["doctor", "--json", "--ranks", "1"],
        ["--json"],
    ],
)
def test_an_error_under_json_is_one_object_on_stdout(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert err == "" and set(error) == {"type", "message"} and error["type"] == "ConfigError" and error["message"]


def test_files_that_hold_no_config_no_cluster_and_no_records_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"empty": b"", "broken": b'{"a":', "binary": b"\xff\xfe\x00", "list": b"[1]", "deep": b"[" * 100_000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    write_records(tmp_path / "nan", [record("probe.launch", 1.0, "us")])
    (tmp_path / "nan").write_text((tmp_path / "nan").read_text().replace('"value": 1.0', '"value": NaN'))
    for name in (*contents, "nan", "none", "."):
        path = str(tmp_path / name)
        for words in (
            ["check-config", path],
            ["plan", "--config", EP16, "--cluster", path],
            [*PLAN, "--load", path],
            ["calibrate", path, "--cluster", CLUSTER],
            ["report", path, "-o", str(tmp_path / "out")],
        ):
            assert main(words) == 2, words
            assert capsys.readouterr().out == ""
    assert main(["report", str(tmp_path / "nan")]) == 2
    assert f"{tmp_path / 'nan'}:1: record.value=nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_tries_its_folder_before_it_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    write_records(path, [record("system.loopback.training.ep16.loss.step1", 3.0, "loss")])
    assert main(["report", str(path), "-o", str(path)]) == 2
    assert f"out={path}: cannot be written" in capsys.readouterr().err
    assert writable_folder(tmp_path / "a" / "b", "out").is_dir() and list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("words", [[], ["--nodes", "0", "--", "true"], ["--rate", "xmbit", "--", "true"], ["--prt"]])
def test_the_test_bed_refuses_with_2_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert testbed.main(words) == 2
    assert capsys.readouterr().err.startswith("ConfigError: ")


def test_a_benchmark_that_fails_while_it_runs_exits_with_1_and_ctrl_c_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(LayerBenchmark):
        def launches(self, stack: object) -> Any:
            raise EngineError("bench.ranks=2: [/x] rank 1 failed")  # no markup

    def interrupt(parsed: object) -> int:
        raise KeyboardInterrupt

    assert harness.run_benchmark(Failing, []) == 1
    assert capsys.readouterr().err == "EngineError: bench.ranks=2: [/x] rank 1 failed\n"
    monkeypatch.setattr("ds_moe_ep.cli.main.run_knobs", interrupt)
    assert main(["knobs"]) == 130


def test_options_behind_two_dashes_or_of_a_command_are_not_the_parsers() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--rank", type=int)
    parser.add_argument("rest", nargs="...")
    assert parser.parse_args(["--rank", "1", "--", "--other"]).rest == ["--", "--other"]
    assert parser.parse_args(["run", "--other"]).rest == ["run", "--other"]
    with pytest.raises(ConfigError, match="--rnk: unknown option; did you mean '--rank'"):
        parser.parse_args(["--rnk", "1", "run"])
