import json
from argparse import Namespace
from pathlib import Path

import pytest

from ds_moe_ep.training.command import launcher, read_settings, without_options
from ds_moe_ep.training.options import TRACE_EVERY


@pytest.mark.parametrize(
    ("meter_every", "trace", "steps", "expected"),
    [
        (None, None, 80, 0),
        (7, None, 80, 7),
        (None, "out.json", 80, TRACE_EVERY),
        (0, "out.json", 80, TRACE_EVERY),
        (7, "out.json", 80, 7),
        (50, "out.json", 12, 12),
        (None, "out.json", 2, 2),
    ],
)
def test_a_trace_turns_the_meter_on_and_lets_it_measure_before_the_end(
    meter_every: int | None, trace: str | None, steps: int, expected: int, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    section = {"num_experts": 4, "model": "small"} | ({} if meter_every is None else {"meter_every": meter_every})
    path.write_text(json.dumps({"train_batch_size": 4, "moe_ep": section}))
    ds_config, read = read_settings(
        Namespace(deepspeed_config=str(path), trace=trace, watch=None, steps=steps, replicas=None)
    )
    assert ds_config["moe_ep"].get("meter_every", 0) == expected
    assert read.model is not None and ds_config["train_batch_size"] == 4
    assert {**ds_config["moe_ep"], "meter_every": 0} == {**section, "meter_every": 0}


@pytest.mark.parametrize(("given", "expected"), [(None, 2), (1, 1), ("auto", "auto"), (0, 0)])
def test_replicas_of_the_command_line_stand_for_those_of_the_section(
    given: int | str | None, expected: int | str, tmp_path: Path
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"moe_ep": {"model": "small", "replicas": 2}}))
    args = Namespace(deepspeed_config=str(path), trace=None, watch=None, steps=80, replicas=given)
    ds_config, section = read_settings(args)
    assert ds_config["moe_ep"]["replicas"] == section.moe.replicas == expected


@pytest.mark.parametrize(("given", "every"), [({}, 1), ({"report_every": 5, "meter_every": 3}, 5)])
def test_a_watched_run_reports_each_step_and_measures_unless_the_section_says_how_often(
    given: dict[str, int], every: int, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"moe_ep": {"model": "small", **given}}))
    ds_config, _ = read_settings(
        Namespace(deepspeed_config=str(path), trace=None, watch="runs", steps=80, replicas=None)
    )
    section = ds_config["moe_ep"]
    assert (section["watch"], section["report_every"]) == ("runs", every)
    assert section["meter_every"] == given.get("meter_every", TRACE_EVERY)


def test_a_resumed_run_keeps_every_setting_but_those_that_it_sets_anew() -> None:
    arguments = ["--local_rank=3", "--steps", "20", "--seed", "7", "--save=old", "--resume", "older", "--data", "x/"]
    assert without_options(arguments) == ["--seed", "7", "--data", "x/"]


def test_a_value_that_is_also_a_files_name_stays_and_a_path_behind_an_equals_sign_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("7", "ds.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    arguments = ["--seed", "7", "--deepspeed_config=ds.json", "--save-every", "7"]
    expected = ["--seed", "7", f"--deepspeed_config={tmp_path / 'ds.json'}", "--save-every", "7"]
    assert without_options(arguments) == expected


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds.json").touch()
    monkeypatch.chdir(tmp_path)
    assert without_options(["--deepspeed_config", "ds.json"]) == ["--deepspeed_config", str(tmp_path / "ds.json")]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "16"}, "deepspeed --num_gpus 16"),
        ({"WORLD_SIZE": "16", "CROSS_SIZE": "4"}, "deepspeed --hostfile HOSTFILE"),
        ({"WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "16"}, "torchrun --nproc_per_node 16"),
        (
            {"WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nnodes 4 --nproc_per_node 4",
        ),
        (
            {"WORLD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            "mpirun -np 4 --map-by slot:OVERSUBSCRIBE --bind-to none python",
        ),
        (
            {"WORLD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"},
            "mpirun -np 4 --hostfile HOSTFILE -x OMP_NUM_THREADS=1 --map-by slot:OVERSUBSCRIBE --bind-to none python",
        ),
    ],
)
def test_the_command_starts_with_the_launcher_that_started_the_run(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    words = launcher(environment)
    names = [Path(word).name if word.startswith("/") else word for word in words]
    assert " ".join(names).replace("python3.11", "python").replace("python3", "python") == expected
