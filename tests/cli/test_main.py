"""The command line: what it prints, its exit codes, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep import __version__
from ds_moe_ep.check.config import Budget, check_config
from ds_moe_ep.cli.main import main
from ds_moe_ep.cli.tables import one_line
from ds_moe_ep.config.shipped import shipped_ds_configs
from ds_moe_ep.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EP16 = ROOT / "ds_configs" / "ep16.json"
CONFIG: dict[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "moe_ep": {"ep_size": 4, "model": "small"},
}


def write(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.skipif(not EP16.exists(), reason="ds_configs/ep16.json is missing")
def test_check_config_tells_memory_traffic_and_the_specifications_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(EP16), "--world-size", "16", "--gpu-gb", "80", "--verbose"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "34,359,738,368",
        "6.45 GB",
        "10,240,000",
        "7.10 GFLOP",
        "668 MB",
        "blocks of queries",
        "none of them was measured",
    ):
        assert expected in printed


def test_the_answers_of_check_config_are_at_most_eight_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    copies = write(tmp_path, CONFIG | {"moe_ep": CONFIG["moe_ep"] | {"replicas": 1}})
    for config in (*shipped_ds_configs(), copies, "ep8"):
        assert main(["check-config", config, "--gpu-gb", "80"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 8 and "can run" in lines[0] and "--verbose" in lines[-1], config
        assert ("slots for 1 replicas" in lines[2]) == (config == copies)
    assert any("59.77 GB of 76 GB (4 in reserve)" in line for line in lines)
    assert main(["check-config", write(tmp_path, CONFIG), "--verbose", "--json"]) == 2
    assert "not allowed with" in capsys.readouterr().out


def test_check_config_prints_json_that_agrees_with_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, CONFIG)
    assert main(["check-config", path, "--world-size", "8", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(check_config(path, 8).to_dict()))
    assert printed["training"]["num_replicas"] == 2
    assert printed["details"]["memory"]["peak"] > printed["details"]["memory"]["persistent"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"moe_ep": {"epsize": 4}}, [], "ConfigError: moe_ep.epsize=4: unknown key; did you mean 'ep_size'?"),
        ({"moe_ep": None}, [], "ConfigError: moe_ep=None"),
        ({"zero_optimization": {"stage": 3}}, [], "ConfigError: zero_optimization.stage=3"),
        ({}, ["--world-size", "6"], "TopologyError: moe_ep.ep_size=4 does not divide"),
        ({}, ["--world-size", "8", "--gpu-gb", "0.001", "--reserve-gb", "0"], "ConfigError: gpu_gb=0.001"),
        ({}, ["--gpu-gb", "2"], "ConfigError: gpu_gb=2 with reserve_gb=4"),
        ({}, ["--load", "0.5"], "ConfigError: --load=0.5: give a number that is at least 1"),
    ],
)
def test_what_cannot_work_exits_with_2_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], arguments: list[str], message: str
) -> None:
    assert main(["check-config", write(tmp_path, {**CONFIG, **changes}), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)


def test_a_missing_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_ds_config_without_the_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such section"):
        check_config({"train_batch_size": 4})


def test_a_ds_config_without_a_model_checks_routing_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**CONFIG, "moe_ep": {"ep_size": 4}}
    assert main(["check-config", write(tmp_path, values), "--world-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "moe_ep.model is not given" in printed
    assert "GFLOP" not in printed


def big(**changes: Any) -> dict[str, Any]:
    """The specification's model with 4 sequences per micro-batch, in fp16 under ZeRO-1."""
    return {
        "train_batch_size": 1024,
        "train_micro_batch_size_per_gpu": 4,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "moe_ep": {"ep_size": 16, "model": "specification"},
        **changes,
    }


@pytest.mark.parametrize(
    ("ds_config", "gpu_gb", "fix"),
    [
        (big(), 60, "train_micro_batch_size_per_gpu=2 with gradient_accumulation_steps=32 fits"),
        (big(), 40, "move the optimizer to the host"),
        (big(zero_optimization={}), 40, "set zero_optimization.stage to 1"),
        (big(moe_ep={"ep_size": 16, "model": {"recompute": False}}), 40, "set moe_ep.model.recompute to true"),
        (big(moe_ep={"ep_size": 8, "model": "specification"}), 40, "raise moe_ep.ep_size from 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(ds_config: dict[str, Any], gpu_gb: float, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        check_config(ds_config, 16, Budget(gpu_gb=gpu_gb))


def test_the_way_out_that_is_offered_fits() -> None:
    check_config(big(train_micro_batch_size_per_gpu=2), 16, Budget(gpu_gb=60))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"fp16": {"enabled": True}}, "fp16 does not run on DeepSpeed's CPU accelerator"),
        ({"my_own_section": {}}, "my_own_section: DeepSpeed 0.19.8 does not know this key"),
        (
            {"data_parallel_size": 8},
            "data_parallel_size: DeepSpeed 0.19.8 reads it beside sequence_parallel_size alone",
        ),
        ({"moe_ep": {"ep_size": 4, "depth": 0}}, "every transfer blocks"),
        ({"moe_ep": {"ep_size": 4, "balance": "none"}}, "nothing keeps an expert from taking every row"),
        ({"moe_ep": {"model": "specification"}}, "heads of 512"),
    ],
)
def test_what_is_legal_but_worth_knowing_is_a_note(changes: dict[str, Any], note: str) -> None:
    ds_config = {**CONFIG, **changes}
    budget = Budget(gpu_gb=10_000)
    assert any(note in line for line in check_config(ds_config, 8, budget).notes)
    assert not any(note in line for line in check_config(CONFIG, 8, budget).notes)  # the control


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_ds_config_of_the_repository_can_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(path)]) == 0
    assert "can run" in capsys.readouterr().out


def test_knobs_and_figures_print_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knobs"]) == 0
    printed = capsys.readouterr().out
    for knob in (
        "| `top_k` | experts that a token visits | `1` | int |",
        "| `num_layers` | transformer layers | `4` | int |",
        "| `pp_size` | pipeline stages, which share the layers | `1` | int |",
    ):
        assert knob in printed
    assert main(["figures"]) == 0
    assert "| expert computation | 5.0 ms | 695 ms at peak |" in capsys.readouterr().out


def test_help_names_the_commands_and_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], "check-config"), (["--version"], __version__)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


def test_check_config_runs_as_a_module_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        f"sys.argv = ['ds-moe-ep', 'check-config', {write(tmp_path, CONFIG)!r}, '--world-size', '8']\n"
        "from ds_moe_ep.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "can run" in done.stdout


def test_a_note_that_is_longer_than_a_line_ends_behind_a_clause_or_a_word() -> None:
    note = "note: heads of 512: flash kernels end at 256; on GPUs attention runs by blocks"
    assert one_line(note, len(note)) == note
    assert one_line(note, 60) == "note: heads of 512: flash kernels end at 256 \u2026"
    assert one_line(note, 30) == "note: heads of 512: flash \u2026"
    assert all(len(one_line(note, width)) <= width for width in range(20, 80))
