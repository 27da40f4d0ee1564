"""Trainer and Accelerate on the package's own layers: all of it with one line, and the same losses without."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.ranks import REPOSITORY, RankPool


def run_examples(folder: str) -> dict[str, Any]:
    """Output of each example on this rank, and the bias of its first layer after it."""
    from accelerate.state import AcceleratorState

    sys.path.insert(0, str(REPOSITORY / "examples"))
    trainer: Any = importlib.import_module("train_with_trainer")
    loop: Any = importlib.import_module("train_with_accelerate")
    runs = {
        "trainer": lambda: trainer.train(arguments(trainer, 6, "--output", f"{folder}/trainer")),
        "trainer, resumed": lambda: trainer.train(arguments(trainer, 8, "--output", f"{folder}/trainer")),
        "trainer, plain": lambda: trainer.train(arguments(trainer, 6, "--plain", "--output", f"{folder}/plain")),
        "loop": lambda: loop.train(arguments(loop, 8, "--output", f"{folder}/loop")),
        "loop, plain": lambda: loop.train(arguments(loop, 8, "--plain")),
    }
    found = {}
    for name, run in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate takes one plugin a process
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            model = run()
        layer = model.moe if hasattr(model, "moe") else model.blocks[0]
        found[name] = printed.getvalue(), layer.balance.steps_E.tolist(), layer.config.top_k
        dist.barrier()
    return found


def arguments(example: Any, steps: int, *more: str) -> Any:
    saving = ["--save-every", "3"] if example.__name__ == "train_with_trainer" else []
    return example.parse_arguments(["--steps", str(steps), *saving, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def found(pool: RankPool, folder: Path) -> list[dict[str, Any]]:
    return pool.run(2, run_examples, str(folder), timeout_s=200)


def losses_of(printed: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in printed.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize("name", ["trainer", "loop"])
def test_the_section_is_in_force_and_the_bias_moves_with_the_line_and_without(name: str, found: Any) -> None:
    first, second = found
    for run in (name, f"{name}, plain"):
        (printed, steps, top_k), (_, others, _) = first[run], second[run]
        assert steps == others and any(steps), "alike on all ranks"
        assert top_k == (2 if name == "trainer" else 1)
        losses = losses_of(printed)
        assert len(losses) >= 6 and losses[-1] < losses[0]
    assert losses_of(first[name][0]) == losses_of(first[f"{name}, plain"][0])
    assert first[name][1] == first[f"{name}, plain"][1]
    assert "ds_moe_ep.MoE, schedule 'peers'" in first[name][0] and "dispatch lane" in first[name][0]
    assert "dispatch lane" not in first[f"{name}, plain"][0]


def test_the_trainers_checkpoints_hold_all_experts_and_no_file_of_some(found: Any, folder: Path) -> None:
    assert len(losses_of(found[0]["trainer, resumed"][0])) == 2, "steps 7 and 8"
    for kind in ("trainer", "plain"):
        for step in (3, 6):
            checkpoint = folder / kind / f"checkpoint-{step}"
            files = [path.name for path in (*checkpoint.glob("*.safetensors"), *checkpoint.glob("*model*.bin"))]
            assert files == (["model.safetensors"] if kind == "trainer" else []), "attach_overlap's is whole"
            assert len(list((checkpoint / f"global_step{step}").glob("layer_0_expert_*"))) == 8
    assert len(list(folder.glob("loop/**/layer_0_expert_*"))) == 8


def test_the_trainers_model_file_loads_in_one_process_and_holds_each_expert_in_its_place(
    found: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    trainer: Any = importlib.import_module("train_with_trainer")
    checkpoint = folder / "trainer" / "checkpoint-6"
    model = trainer.Model(ep_size=1)
    missing, others = model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    assert not missing
    assert {name.split(".", 2)[2] for name in others} == {"deepspeed_moe.gate.balance.steps_E"}, "the section's bias"
    for layer in range(2):
        for expert in range(8):
            (path,) = checkpoint.glob(f"global_step6/layer_{layer}_expert_{expert}_*")
            saved = torch.load(path)
            assert len(saved) == 2
            assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items()), path
