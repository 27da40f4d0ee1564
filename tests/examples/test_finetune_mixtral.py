"""Trainer, Accelerate and a plain loop on AutoEP's layers: the same losses with the hooks and without them.

The examples' own functions run on forked ranks, which saves seven starts of four processes. The command that a user
types, under the real deepspeed launcher, is a slow test.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.engine.hugging_face.tiny_models import distance, load, logits_of
from tests.examples.spoilt import losses_of, spoilt
from tests.examples.training_scripts import EXAMPLES, launched
from tests.ranks import RankPool

NUM_RANKS = 2
STEPS = 4  # after which the meter of the Trainer's callback reports
# Each step of AdamW moves by the last bits of its gradient. Losses are printed to 1e-6; seen: 1e-6 of 4 after 12 steps.
BOUND = 4e-6
HOOKED = ("--schedule", "peers")
SCRIPTS = (
    ("trainer", "finetune_mixtral", STEPS),
    ("loop", "finetune_mixtral_accelerate", 3),
    ("autoep", "hook_autoep", 3),
)


def forked(folder: str, runs: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """Output of rank 0 in each run (example, arguments); "--spoil" brings results to the wrong tokens.

    In `folder` lies a model with the random weights that the examples make themselves.
    """
    import torch
    from accelerate.state import AcceleratorState

    import ds_moe_ep

    sys.path.insert(0, str(EXAMPLES))
    ds_moe_ep.init_distributed(verbose=False)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        importlib.import_module("hook_autoep").make_model(None).save_pretrained(folder)
    dist.barrier()
    printed = {}
    for name, (script, arguments) in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate takes one plugin a process
        example: Any = importlib.import_module(script)
        args = example.parse_arguments([a for a in arguments if a != "--spoil"])
        with spoilt("--spoil" in arguments), contextlib.redirect_stdout(io.StringIO()) as output:
            model = example.train(args)
        printed[name] = output.getvalue()
        if "--save" in arguments:
            printed["saved"] = distance_to_saved(model, args.save)
        dist.barrier()
    return printed


def distance_to_saved(model: Any, folder: str) -> str:
    """The distance of the trained model's logits to those of the folder that the Trainer wrote. Collective."""
    trained = logits_of(model)
    dist.barrier()
    found = f"{distance(logits_of(load(Path(folder))), trained):.1e}"
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def printed(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of rank 0 in runs of all examples, in the same four processes."""
    folder = str(tmp_path_factory.mktemp("mixtral"))
    runs = {}
    for name, script, steps in SCRIPTS:
        words = ["--steps", str(steps)]
        more = {"trainer": ["--save", f"{folder}/trained"], "loop": ["--zero-stage", "3"]}.get(name, [])
        runs[f"{name}, unhooked"] = (script, [*words, "--no-overlap", "--model", folder])
        runs[f"{name}, hooked"] = (script, [*words, *HOOKED, *more])
        runs[f"{name}, spoilt"] = (script, ["--steps", "2", *HOOKED, "--spoil"])
    return pool.run(NUM_RANKS, forked, folder, runs, timeout_s=200)[0]


@pytest.mark.parametrize("name", ["trainer", "loop", "autoep"])
def test_losses_are_those_of_the_model_in_a_folder_without_hooks_and_others_where_results_go_astray(
    name: str, printed: dict[str, str]
) -> None:
    unhooked, hooked, spoilt_run = (losses_of(printed[f"{name}, {kind}"]) for kind in ("unhooked", "hooked", "spoilt"))
    assert len(unhooked) >= 3
    assert hooked == pytest.approx(unhooked, rel=BOUND)
    assert unhooked[-1] < unhooked[0]  # it learns
    for layer in range(2):
        assert f"model.layers.{layer}.mlp: AutoEPMoELayer, schedule 'peers'" in printed[f"{name}, hooked"]
    assert "AutoEPMoELayer" not in printed[f"{name}, unhooked"]
    assert name != "trainer" or "dispatch lane" in printed[f"{name}, hooked"], "the callback's meter saw the transfers"
    assert max(abs(one - other) / other for one, other in zip(spoilt_run, unhooked[:2], strict=True)) > 10 * BOUND


def test_the_trainer_saves_the_whole_model_as_a_folder_of_hugging_faces(printed: dict[str, str]) -> None:
    assert float(printed["saved"]) <= 2e-6, "another order of sums over two experts"


@pytest.mark.slow
@pytest.mark.timeout(600)  # 35 s of processor time, most of it imports in 4 fresh processes
def test_the_trainer_under_the_launcher_trains_to_the_unhooked_losses_with_the_callback(
    printed: dict[str, str],
) -> None:
    unhooked = losses_of(printed["trainer, unhooked"])
    assert len(unhooked) == STEPS
    by_launcher = launched("finetune_mixtral.py", "--steps", str(STEPS), *HOOKED, num_ranks=NUM_RANKS, limit_s=400)
    assert losses_of(by_launcher) == pytest.approx(unhooked, rel=BOUND)
    for layer in range(2):
        assert f"model.layers.{layer}.mlp: AutoEPMoELayer, schedule 'peers'" in by_launcher
    assert "dispatch lane" in by_launcher  # the meter saw the hooks' transfers
