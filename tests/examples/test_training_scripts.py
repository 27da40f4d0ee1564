"""The training scripts on gloo ranks: stopped by a signal to one rank, resumed to the same losses, refused once."""

from __future__ import annotations

import json
import pathlib
import re
import signal

import pytest

from ds_moe_ep.live.folder import RunFolder
from tests.examples.training_scripts import EXPERT_PARALLEL, PIPELINE, Case, Outcome, room_for, run_cases
from tests.ranks import RankPool

SCRIPTS = {"train_ep16": EXPERT_PARALLEL, "train_tp8_pp2": PIPELINE}
STEPS = 5
RAW = "a text of many words, which repeat and repeat; " * 200


@pytest.fixture(scope="module", params=SCRIPTS)
def outcomes(
    pool: RankPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Outcome]]:
    """Outcomes of all cases of a script, by rank; its folder is named in the words."""
    folder = tmp_path_factory.mktemp(request.param)
    for script, other in SCRIPTS.items():
        (folder / f"{script}.json").write_text(json.dumps(other))
    [others] = set(SCRIPTS) - {request.param}
    for name, text in (("text", RAW), ("other", RAW.upper()), ("short", "short")):
        (folder / name).write_text(text)
    config, data = ["--deepspeed_config", str(folder / f"{request.param}.json")], ["--data", str(folder / "text")]
    usual = [*config, *data, "--eval-batches", "1", "--report-every", "1"]
    to_end = [*usual, "--steps", str(STEPS)]
    checkpoint = str(folder / "ck")
    replicas = ["--replicas", "1"] if request.param == "train_ep16" else []

    def differently(option: str, on_0: str, on_1: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
        return ((0, (option, str(folder / on_0))), (1, (option, str(folder / on_1))))

    cases = {
        "whole": Case(to_end),
        "stopped": Case([*to_end, "--save", checkpoint], signalled=(signal.SIGTERM, 1, 2)),
        "resumed": Case([*to_end, "--save", checkpoint, "--resume", checkpoint, "--save-every", "2"]),
        "not saved": Case(to_end, signalled=(signal.SIGINT, 0, 0)),
        "watched": Case([*usual, "--steps", "2", "--watch", str(folder / "run"), *replicas]),
        "mistyped": Case([*usual, "--stepz", "3"]),
        "no config": Case(data),
        "missing": Case([*config, "--data", str(folder / "none")]),
        "missing on one": Case(config, differently("--data", "text", "none")),
        "short": Case([*config, "--data", str(folder / "short")]),
        "other text": Case(config, differently("--data", "text", "other")),
        "no place on one": Case(usual, differently("--save", "ck", "text")),
        "every, nowhere": Case([*usual, "--save-every", "2"]),
        "the other's": Case(["--deepspeed_config", str(folder / f"{others}.json"), *data]),
        "nothing to resume": Case([*usual, "--resume", str(folder)]),
    }
    return pool.run(2, run_cases, request.param, cases, timeout_s=200)


def test_a_signal_to_one_rank_ends_all_after_the_same_step_with_one_line_and_the_saved_run_resumes_exactly(
    outcomes: list[dict[str, Outcome]],
) -> None:
    first, other = outcomes
    whole, stopped, resumed = (first[name] for name in ("whole", "stopped", "resumed"))
    assert (whole.code, resumed.code) == (0, 0) and len(whole.steps()) == STEPS
    assert stopped.code == other["stopped"].code == 128 + signal.SIGTERM
    assert list(stopped.steps()) == [1, 2, 3] and list(resumed.steps()) == [4, 5]
    assert {**stopped.steps(), **resumed.steps()} == whole.steps()  # losses, learning rates and gradient norms
    assert len(set(whole.steps().values())) == STEPS  # the control: no step is like another
    [line] = [line for line in stopped.printed.splitlines() if "to resume: " in line]
    assert line == stopped.printed.splitlines()[-1]
    assert re.match(rf"SIGTERM: stopped after step 3 of {STEPS}, checkpoint in \S+/ck; to resume: ", line)
    assert re.search(rf"--save (\S+/ck) --resume \1 --steps {STEPS}$", line)
    assert "validation loss" in resumed.printed and "validation loss" not in stopped.printed
    assert other["stopped"].printed == ""


def test_checkpoints_come_every_so_often_and_at_the_end(outcomes: list[dict[str, Outcome]]) -> None:
    folder = pathlib.Path(re.findall(r"checkpoint in (\S+);", outcomes[0]["resumed"].printed)[0])
    assert sorted(path.name for path in folder.glob("global_step*")) == [f"global_step{n}" for n in (3, 4, 5)]
    assert (folder / "latest").read_text() == "global_step5"


def test_a_run_that_saves_nowhere_says_so_when_it_is_stopped(outcomes: list[dict[str, Outcome]]) -> None:
    stopped = outcomes[0]["not saved"]
    assert stopped.code == outcomes[1]["not saved"].code == 128 + signal.SIGINT
    assert stopped.printed.endswith(f"SIGINT: stopped after step 1 of {STEPS}; nothing is saved: give --save DIR\n")


def test_a_watched_run_writes_a_report_of_each_step_and_a_pipeline_refuses_to(
    outcomes: list[dict[str, Outcome]],
) -> None:
    first, other = (of_rank["watched"] for of_rank in outcomes)
    if first.code is None:
        assert first == other and first.error.startswith("ConfigError: --watch: shows how ranks share experts")
        return
    checkpoint = pathlib.Path(re.findall(r"checkpoint in (\S+);", outcomes[0]["resumed"].printed)[0])
    folder = RunFolder(checkpoint.parent / "run")
    folder.refresh()
    (run,) = folder.runs.values()
    assert [entry.figures["step"] for entry in run.entries] == [1, 2]
    assert run.entries[-1].figures["hidden_percent"] is not None, "the meter is on"
    report = run.entries[-1].read()
    assert report is not None and all(
        len(layer.guests_RS) == 2 and layer.p95 >= layer.p50 >= 1 for layer in report.layers
    )


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("mistyped", r"--stepz: unknown option; did you mean '--steps'\?"),
        ("no config", "--deepspeed_config is missing; give for example ds_configs/"),
        ("missing", "data=.*none: no such file or folder"),
        ("missing on one", r"data=.*none: no such file or folder.* \(ranks 1\)"),
        ("short", "data: . bytes hold no sequence of 16"),
        ("other text", "--data: the ranks read different text"),
        ("no place on one", r"--save=.*text: cannot be written \(File exists\).* \(ranks 1\)"),
        ("every, nowhere", "--save-every=2: without --save there is nowhere to save"),
        ("the other's", "moe_ep.(layout=1x2|ep_size=2): .*; run examples/train_"),
        ("nothing to resume", "--resume=.*: no DeepSpeed checkpoint there"),
    ],
)
def test_what_one_rank_cannot_work_with_is_the_same_error_on_all_of_them(
    case: str, told: str, outcomes: list[dict[str, Outcome]]
) -> None:
    first, other = (of_rank[case] for of_rank in outcomes)
    assert first == other and first.code is None and first.printed == ""
    assert re.match(f"ConfigError: {told}", first.error), first.error


def test_a_place_without_room_for_a_checkpoint_is_refused_on_every_rank(pool: RankPool, tmp_path: pathlib.Path) -> None:
    first, other = pool.run(2, room_for, str(tmp_path), (1000, 10**18))
    assert first == other and first[0] == ""
    told = r"--save=.*: \S+ has [\d.,]+ GB free there, and its 2 ranks write about 1,000,000,000\.0 GB"
    assert re.match(told, first[1])
