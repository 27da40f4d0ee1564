import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from command import launcher, without_options


def test_a_resumed_run_keeps_every_setting_but_those_that_it_sets_anew() -> None:
    arguments = ["--local_rank=3", "--steps", "20", "--seed", "7", "--save=old", "--resume", "older", "--data", "x/"]
    assert without_options(arguments) == ["--seed", "7", "--data", "x/"]


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
    ],
)
def test_the_command_starts_with_the_launcher_that_started_the_run(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    words = launcher(environment)
    names = [Path(word).name if word.startswith("/") else word for word in words]
    assert " ".join(names).replace("python3.11", "python").replace("python3", "python") == expected
