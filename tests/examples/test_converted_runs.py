"""A training script resumes from a checkpoint that the command `convert` has carried to other sizes, or another layout.

What goes on is the loss curve of the run that was never stopped, up to rounding. The control: with moments of zeros it
is another from the second step on.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.examples.training_scripts import EXPERT_PARALLEL, PIPELINE, Case, Outcome, run_cases
from tests.ranks import REPOSITORY, run_ranks

STEPS, SAVED_AT = 6, 3
EP16, STAGES = "train_ep16", "train_tp8_pp2"  # the scripts
QUIET: dict[str, Any] = {"noise": "none"}  # ranks draw noise of their own, and other ranks other noise


def with_section(config: dict[str, Any], **section: Any) -> dict[str, Any]:
    return config | {"moe_ep": config["moe_ep"] | QUIET | section}


CONFIGS = {
    "ep2": with_section(EXPERT_PARALLEL),
    "ep1": with_section(EXPERT_PARALLEL, ep_size=1),
    "ep4": with_section(EXPERT_PARALLEL | {"zero_optimization": {"stage": 2}}, ep_size=4),
    "stages": with_section(PIPELINE),
}
# From which run, by which config and script, on how many ranks.
WAYS: dict[str, tuple[str, str, str, int]] = {
    "ep1": ("ep2", "ep1", EP16, 2),
    "more ranks": ("ep2", "ep4", EP16, 4),
    "stages": ("ep2", "stages", STAGES, 2),
    "back from stages": ("stages", "ep4", EP16, 4),
}


def losses(outcome: Outcome) -> dict[int, float]:
    assert outcome.code == 0, outcome
    return {step: float(words.split()[1]) for step, words in outcome.steps().items()}


def words_of(folder: pathlib.Path, config: str, *more: str) -> list[str]:
    path = folder / f"{config}.json"
    path.write_text(json.dumps(CONFIGS[config]))
    usual = ["--data", str(folder / "text"), "--eval-batches", "1", "--report-every", "1"]
    return ["--deepspeed_config", str(path), *usual, *more]


def converted(folder: pathlib.Path, source: str, target: str, config: str, data_ranks: int) -> str:
    """The folder to which the command has carried a checkpoint."""
    command = [sys.executable, "-m", "ds_moe_ep", "convert", str(folder / source), str(folder / target)]
    words = ["--config", str(folder / f"{config}.json"), "--world-size", str(data_ranks)]
    done = subprocess.run([*command, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(folder / target)


def without_moments(source: str) -> str:
    """A copy of a checkpoint whose first moments are zeros."""
    folder = pathlib.Path(f"{source} without moments")
    shutil.copytree(source, folder)
    for path in folder.glob("*/zero_pp_rank_*"):
        content = torch.load(path, weights_only=False)
        for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["exp_avg"].zero_()
        torch.save(content, path)
    return str(folder)


@pytest.mark.slow  # four starts of the command, each of which imports torch and deepspeed
@pytest.mark.timeout(600)
def test_a_script_resumes_the_loss_curve_from_a_converted_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text").write_text("a text of many words, which repeat and repeat; " * 200)
    whole: dict[str, dict[int, float]] = {}
    for config, script in (("ep2", EP16), ("stages", STAGES)):
        saved = ["--steps", str(SAVED_AT), "--save", str(tmp_path / f"saved {config}")]
        cases = {
            "whole": Case(words_of(tmp_path, config, "--steps", str(STEPS))),
            "stopped": Case(words_of(tmp_path, config, *saved)),
        }
        whole[config] = losses(run_ranks(2, run_cases, script, cases, timeout_s=200)[0]["whole"])
    for name, (source, config, script, num_ranks) in WAYS.items():
        words = words_of(tmp_path, config, "--steps", str(STEPS))
        data_ranks = num_ranks if script == EP16 else 1
        folder = converted(tmp_path, f"saved {source}", f"converted {name}", config, data_ranks)
        cases = {"resumed": Case([*words, "--resume", folder])}
        if name == "ep1":
            cases["control"] = Case([*words, "--resume", without_moments(folder)])
        found = {
            case: losses(its) for case, its in run_ranks(num_ranks, run_cases, script, cases, timeout_s=200)[0].items()
        }
        expected = {step: loss for step, loss in whole[source].items() if step > SAVED_AT}
        assert found.pop("resumed") == pytest.approx(expected, rel=2e-4), name
        for control in found.values():
            assert control[SAVED_AT + 1] == pytest.approx(expected[SAVED_AT + 1], rel=2e-4)
            assert control[STEPS] != pytest.approx(expected[STEPS], rel=2e-3)
