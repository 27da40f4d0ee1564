"""Hugging Face's Trainer and Accelerate on AutoEP's layers: the same losses with the hooks and without them.

The examples' own functions run on forked ranks, which saves seven starts of four processes. The command that a user
types, under the real deepspeed launcher, is a slow test.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from ds_moe_ep.bench.harness.processes import free_port
from tests.ranks import REPOSITORY, SERVER_ENV, run_ranks

EXAMPLES = REPOSITORY / "examples"
STEPS = 6
# Each step of AdamW moves by the last bits of its gradient. Losses are printed to 1e-6; seen: 1e-6 of 4 after 12 steps.
BOUND = 4e-6
HOOKED = ("--schedule", "peers")


def launched(script: str, *arguments: str, limit_s: float = 400.0) -> str:
    """What an example prints under the deepspeed launcher on 4 ranks."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "4", "--master_port", str(free_port()), str(EXAMPLES / script)]
    environment = os.environ | SERVER_ENV | {"PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True, **pipes)
    try:
        printed, _ = process.communicate(timeout=limit_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-3000:]
    return printed


def forked(runs: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """What rank 0 prints in each run (example, arguments); "--spoil" brings results to the wrong tokens."""
    from accelerate.state import AcceleratorState

    sys.path.insert(0, str(EXAMPLES))
    printed = {}
    for name, (script, arguments) in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate takes one plugin a process
        example: Any = importlib.import_module(script)
        example.set_up_process()
        args = example.parse_arguments(None, [a for a in arguments if a != "--spoil"])
        with spoilt("--spoil" in arguments), contextlib.redirect_stdout(io.StringIO()) as output:
            example.train(args)
        printed[name] = output.getvalue()
        dist.barrier()
    return printed


@contextlib.contextmanager
def spoilt(is_spoilt: bool) -> Any:
    """Runs its block with layers that give the first token's result to the second one, and so on."""
    from ds_moe_ep.moe import dispatcher

    def misplaced(*arguments: Any) -> Any:
        return unpermute(*arguments).roll(1, dims=0)

    unpermute = dispatcher.unpermute
    with mock.patch.object(dispatcher, "unpermute", misplaced) if is_spoilt else contextlib.nullcontext():
        yield


def losses_of(printed: str) -> list[float]:
    """The losses that an example prints, step by step."""
    return [float(loss) for loss in re.findall(r"^step \d+ \| loss ([\d.]+)$", printed, re.MULTILINE)]


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What rank 0 prints in runs of both examples, in the same four processes."""
    trainer, loop = ("finetune_mixtral", ["--steps", str(STEPS)]), ("finetune_mixtral_accelerate", ["--steps", "3"])
    runs = {}
    for name, (script, steps) in (("trainer", trainer), ("loop", loop)):
        runs[f"{name}, unhooked"] = (script, [*steps, "--no-overlap"])
        runs[f"{name}, hooked"] = (script, [*steps, *HOOKED, "--zero-stage", "3"])
        runs[f"{name}, spoilt"] = (script, [*steps, *HOOKED, "--spoil"])
    return run_ranks(4, forked, runs, timeout_s=200)[0]


@pytest.mark.parametrize("name", ["trainer", "loop"])
def test_losses_are_the_same_with_hooks_under_zero_3_and_others_where_results_go_astray(
    name: str, printed: dict[str, str]
) -> None:
    unhooked, hooked, spoilt_run = (losses_of(printed[f"{name}, {kind}"]) for kind in ("unhooked", "hooked", "spoilt"))
    assert len(unhooked) >= 3
    assert hooked == pytest.approx(unhooked, rel=BOUND)
    assert unhooked[-1] < unhooked[0]  # it learns
    for layer in range(2):
        assert f"model.layers.{layer}.mlp: AutoEPMoELayer, schedule 'peers'" in printed[f"{name}, hooked"]
    assert "AutoEPMoELayer" not in printed[f"{name}, unhooked"]
    assert name == "loop" or "dispatch lane" in printed[f"{name}, hooked"], "the callback's meter saw the transfers"
    assert max(abs(one - other) / other for one, other in zip(spoilt_run, unhooked, strict=True)) > 10 * BOUND


@pytest.mark.slow
@pytest.mark.timeout(600)  # 35 s of processor time, most of it imports in 6 fresh processes
def test_the_trainer_under_the_launcher_trains_to_the_unhooked_losses_with_the_callback(
    printed: dict[str, str],
) -> None:
    unhooked = losses_of(printed["trainer, unhooked"])
    assert len(unhooked) == STEPS
    by_launcher = launched("finetune_mixtral.py", "--steps", str(STEPS), *HOOKED)
    assert losses_of(by_launcher) == pytest.approx(unhooked, rel=BOUND)
    for layer in range(2):
        assert f"model.layers.{layer}.mlp: AutoEPMoELayer, schedule 'peers'" in by_launcher
    assert "dispatch lane" in by_launcher  # the meter saw the hooks' transfers
